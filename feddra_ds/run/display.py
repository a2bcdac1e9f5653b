"""A live display on a terminal that log lines do not tear; nothing at all where there is no terminal."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TextIO

from rich.console import Console, RenderableType
from rich.live import Live

REFRESHES_PER_SECOND = 4


class Display:
    """Draws what `render` returns below everything that is written meanwhile, at the terminal's present width.

    render is called from another thread. On a pipe or a dumb terminal start() and stop() do nothing.
    """

    def __init__(self, console: Console, render: Callable[[], RenderableType]):
        self.console, self.render = console, render
        self._live: Live | None = None
        self._redirected: list[tuple[logging.StreamHandler[TextIO], TextIO]] = []

    def start(self) -> None:
        """Begin to draw; what goes to stderr, and to stdout where that is a terminal too, appears above."""
        if not (self.console.is_terminal and self.console.is_interactive):
            return
        redirect_stdout = sys.stdout.isatty()  # a pipe keeps what is written to it
        before = {sys.stderr: "stderr"} | ({sys.stdout: "stdout"} if redirect_stdout else {})
        self._live = Live(
            get_renderable=self.render,
            console=self.console,
            refresh_per_second=REFRESHES_PER_SECOND,
            transient=True,
            redirect_stdout=redirect_stdout,
            redirect_stderr=True,
        )
        self._live.start()
        # Handlers hold the stream that they were made with; written to directly, it would tear the display.
        for handler in _stream_handlers():
            name = before.get(handler.stream)
            if name is not None:
                self._redirected.append((handler, handler.stream))
                handler.setStream(getattr(sys, name))

    def stop(self) -> None:
        """Wipe the display and give the streams back."""
        if self._live is None:
            return
        for handler, stream in self._redirected:
            handler.setStream(stream)
        self._redirected.clear()
        self._live.stop()
        self._live = None


def _stream_handlers() -> list[logging.StreamHandler[TextIO]]:
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    return [h for one in loggers for h in one.handlers if isinstance(h, logging.StreamHandler)]
