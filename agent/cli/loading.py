"""Groups of commands whose modules are loaded when they are asked for.

The agent itself, and what asks it something, need a tenth of what all commands together import.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command, get_group


class _Commands(Mapping[str, Any]):
    """Commands by name, made of `module:attribute` when they are looked up: a function, or a Typer application."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> Any:
        module, attribute = self._places[name].split(":")
        command = getattr(import_module(module), attribute)
        if isinstance(command, typer.Typer):
            group = get_group(command)
            group.name = name
            return group
        single = typer.Typer(add_completion=False)
        single.command(name)(command)
        return get_command(single)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def group_of(places: Mapping[str, str]) -> type[TyperGroup]:
    """Return a class for a Typer application whose commands are `places`: name to `module:attribute`."""

    class Group(TyperGroup):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            commands: Any = _Commands(places)  # only ever read
            self.commands = commands

    return Group
