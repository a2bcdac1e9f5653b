"""The entry point for many ranks.

deepspeed [--hostfile H] [--num_accelerators K] launch/train.py --config FILE [--section.key value …]
"""

import sys

from feddra_ds.cli import main

if __name__ == "__main__":
    # the launcher adds --local_rank=N; LOCAL_RANK in the environment says the same
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    raise SystemExit(main(["train", *arguments]))
