"""The order of the files, a line for each long test, and a garbage collector that leaves what the imports made alone."""

from __future__ import annotations

import gc

import pytest

# xdist hands out files in this order, and none of these should be the last to end
LONGEST = ("test_quickstart.py", "test_own_classes.py", "test_docs_commands.py", "test_benchmarks.py")
LONG_S = 60.0
gc.disable()  # while all is imported and collected


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    gc.enable()
    gc.collect()
    gc.freeze()  # a run ends with a collection, which costs a second where it goes through torch's and transformers' modules


class LongTests:
    """Name a test that took long at once: the table at the end never comes where a time limit stops all."""

    def __init__(self, config: pytest.Config):
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.duration > LONG_S:
            self.config.get_terminal_writer().line(f"\n{report.duration:.0f} s: {report.when} of {report.nodeid}")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # what xdist's workers write is not seen
        config.pluginmanager.register(LongTests(config))
