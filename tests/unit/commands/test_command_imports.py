"""Commands start fast: what they work with is imported when they run."""

from __future__ import annotations

import argparse
import subprocess
import sys

from feddra_ds.cli import COMMANDS
from feddra_ds.commands import export
from feddra_ds.model.folder import MAX_SHARD_SIZE


def test_no_help_imports_anything_heavy() -> None:
    """Before arguments are parsed: each of these takes a good part of a second, torch and transformers several."""
    heavy = {"torch", "transformers", "deepspeed", "sklearn", "scipy", "jinja2", "pyarrow", "shtab"}
    code = (
        "import contextlib, io, sys\n"
        "from feddra_ds.cli import COMMANDS, main\n"
        "for command in COMMANDS:\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        main([*command.split(), '--help'])\n"
        "    assert f'usage: feddra-ds {command}' in out.getvalue(), command\n"
        f"    print(command, *sorted({heavy!r} & set(sys.modules)), sep=': ')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines() == list(COMMANDS)


def test_what_only_reads_files_starts_at_once() -> None:
    """These are typed while one waits for something else: not even pydantic, NumPy or psutil is there for their help."""
    commands = ["status", "experiment run", "experiment table", "experiment plot", "report", "search", "config list"]
    code = (
        "import contextlib, io, sys\n"
        "from feddra_ds.cli import main\n"
        f"for command in {commands!r}:\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "        main([*command.split(), '--help'])\n"
        "    print(command, *sorted({'numpy', 'pydantic', 'psutil', 'yaml'} & set(sys.modules)), sep=': ')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines() == commands


def test_export_offers_the_default_of_what_writes() -> None:
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    assert parser.parse_args(["run", "--out", "x"]).max_shard_size == MAX_SHARD_SIZE
