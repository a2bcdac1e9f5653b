"""The entry point for many ranks in a checkout; `deepspeed … --module feddra_ds train …` is the same without one.

deepspeed [--hostfile H] [--num_accelerators K] launch/train.py --config FILE [--section.key value …]
"""

import sys

from feddra_ds.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["train", *sys.argv[1:]]))
