"""`python -m feddra_ds …` is `feddra-ds …`, and `deepspeed --module feddra_ds train …` starts it on many ranks."""

from feddra_ds.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
