"""Progress bars on standard error, only where a person watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

Progress = Callable[[str, int, int], None]  # (what is being done, done so far, in all)
TITLES = {"weights": "loading weights", "kernels": "compiling kernels", "graphs": "capturing CUDA graphs"}


class ProgressBars:
    """A :data:`Progress` that draws one bar for each stage and takes it away when the stage is complete.

    Silent when standard error is not a terminal. Nothing is imported or drawn before the first report.
    """

    def __init__(self, enabled: bool | None = None) -> None:
        self.enabled = sys.stderr.isatty() if enabled is None else enabled
        self._display: Any = None
        self._next = 0.0
        self._tasks: dict[str, Any] = {}

    def due(self) -> bool:
        """True ten times a second, where bars are drawn: for reports that cost something to make."""
        if not self.enabled or time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + 0.1
        return True

    def __call__(self, stage: str, done: float, total: int) -> None:
        if not self.enabled:
            return
        if self._display is None:
            self._start()
        if stage not in self._tasks:
            self._tasks[stage] = self._display.add_task(TITLES.get(stage, stage), total=total)
        self._display.update(self._tasks[stage], completed=done, total=total)
        if done >= total:
            self._display.remove_task(self._tasks.pop(stage))
            if not self._tasks:
                self.close()

    def close(self) -> None:
        """Take all bars away (also after an error)."""
        if self._display is not None:
            self._display.stop()
            self._display, self._tasks = None, {}

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._display = Progress(*columns, console=Console(stderr=True), transient=True)
        self._display.start()
