"""Commands start fast: what they work with is imported when they run."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from feddra_ds import commands
from feddra_ds.commands import export
from feddra_ds.model.folder import MAX_SHARD_SIZE


def test_importing_the_commands_imports_nothing_heavy() -> None:
    names = sorted(f"feddra_ds.commands.{path.stem}" for path in Path(commands.__path__[0]).glob("[!_]*.py"))
    assert {"feddra_ds.commands.evaluate", "feddra_ds.commands.doctor"} <= set(names)
    code = (
        "import sys, importlib\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "print(*sorted({'torch', 'transformers', 'sklearn', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == []


def test_export_offers_the_default_of_what_writes() -> None:
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    assert parser.parse_args(["run", "--out", "x"]).max_shard_size == MAX_SHARD_SIZE
