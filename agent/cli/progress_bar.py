"""A bar that shows how far long work is."""

from collections.abc import Callable

from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from agent.cli.terminal import err
from agent.telemetry.progress import Progress


class ProgressBar:
    """Progress on the terminal; nothing where standard error is none."""

    def __init__(self, first: str) -> None:
        """`first`: the stage that is shown before one is reported."""
        self._first = first
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Bar(*columns, *times, console=err, transient=True, disable=not err.is_terminal)
        self._task: TaskID | None = None
        self.report: Callable[[Progress], None] = self._show

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        self._task = self._bar.add_task(self._first, total=None)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _show(self, progress: Progress) -> None:
        assert self._task is not None
        self._bar.update(self._task, description=progress.stage, completed=progress.done, total=progress.total or None)
