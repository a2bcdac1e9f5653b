"""`python -m feddra_ds` is `feddra-ds`."""

from feddra_ds.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
