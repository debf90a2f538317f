"""How the demo tells its story: chapters, steps with their timings, commands, tables."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.padding import Padding
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

_WIDEST = 100
_INDENT = 2


class Narrator:
    """Writes to a terminal, or plainly to a file or pipe. Text is rich's markup."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._width = min(console.width, _WIDEST)
        fancy = console.encoding.lower().startswith("utf")
        self._done, self._failed = ("✓", "✗") if fancy else ("ok", "FAILED")
        self._spinner = "dots" if fancy else "line"
        self._chapters = 0

    def title(self, title: str, text: str) -> None:
        """Write a headline with a line or two below it."""
        self.console.print(f"\n[bold]{title}[/]")
        self.say(text)

    def chapter(self, title: str, text: str = "") -> None:
        """Begin the next numbered chapter with a line or two of explanation."""
        self._chapters += 1
        self.console.print(f"\n[bold cyan]{self._chapters}  {title}[/]")
        if text:
            self.say(text, style="dim")

    def say(self, text: str, *, style: str = "") -> None:
        """Write a paragraph, wrapped and indented."""
        self._wrapped(Text.from_markup(text, style=style), _INDENT)

    @property
    def output_width(self) -> int:
        """Columns that `output` has for a line."""
        return self._width - 2 * _INDENT

    def output(self, text: str) -> None:
        """Show what a command has printed, wrapped and indented twice."""
        for line in text.splitlines():
            self._wrapped(Text(line), 2 * _INDENT)

    def _wrapped(self, text: Text, indent: int) -> None:
        for line in text.wrap(self.console, self._width - indent):
            line.rstrip()
            self.console.print(Padding(line, (0, 0, 0, indent), expand=False))

    def lines(self, *texts: str) -> None:
        """Write lines that are to be copied whole, indented twice: only the terminal may wrap them."""
        for text in texts:
            self.console.print(" " * 2 * _INDENT + text, soft_wrap=True)

    def command(self, text: str) -> None:
        """Show a command that a person would type; what it prints may follow."""
        self.console.print(f"{' ' * _INDENT}[bold]$ {text}[/]", soft_wrap=True)

    def table(self, table: Table) -> None:
        """Show a table, indented."""
        self.console.print(Padding(table, (0, 0, 0, 2 * _INDENT), expand=False), width=self._width)

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Show that `text` is under way, then that it is done (or failed) and how long it took."""
        started, mark = time.monotonic(), f"[red]{self._failed}[/]"
        try:
            with self.waiting(text):
                yield
            mark = f"[green]{self._done}[/]"
        finally:
            self._row(f"{mark} {text}", time.monotonic() - started)

    def waiting(self, text: str) -> Live:
        """Return a context in which a terminal shows that `text` is under way; it disappears at its end."""
        spinner = Spinner(self._spinner, f"{text} ...")
        return Live(Padding(spinner, (0, 0, 0, _INDENT)), console=self.console, transient=True)

    def done(self, text: str, seconds: float) -> None:
        """Write a line like a step's that is done, for what took `seconds`."""
        self._row(f"[green]{self._done}[/] {text}", seconds)

    def _row(self, text: str, seconds: float) -> None:
        row = Table.grid(expand=True, padding=(0, 1))
        row.add_column(ratio=1)
        row.add_column(justify="right", no_wrap=True, style="dim")
        row.add_row(text, f"{seconds:.1f} s")
        self.console.print(Padding(row, (0, 0, 0, _INDENT)), width=self._width)
