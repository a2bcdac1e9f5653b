"""Arrays in, numbers out: ranking, classification, intervals. NumPy and SciPy only."""
