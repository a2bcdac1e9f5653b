"""Experiments: a spec becomes a grid of runs over seeds, the runs become rows, the rows become tables and pictures."""
