"""What is noted of a base backup: a small JSON object in its folder, which WAL-G ignores and removes with it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import structlog

from agent.domain.restore_target import format_time
from agent.errors import RepositoryCorrupt, RepositoryError
from agent.ports import ObjectStore
from agent.repository.documents import Document, read_document
from agent.repository.keys import backup_folder, sentinel_key

T = TypeVar("T")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class BackupNote:
    """One kind of note. `what` it is called in the log; what is larger than `max_bytes` is not believed."""

    file_name: str
    what: str
    max_bytes: int = 64 << 10

    def key(self, backup: str) -> str:
        """Key of the note on the base backup `backup`."""
        return f"{backup_folder(backup)}{self.file_name}"

    async def read(self, store: ObjectStore, backup: str, parse: Callable[[Document], T]) -> T | None:
        """Return what `parse` makes of the note; None if there is none, or if it is damaged, which is told.

        Raises:
            RepositoryError: It could not be read.
        """
        try:
            document = await read_document(store, self.key(backup), self.max_bytes)
            return None if document is None else parse(document)
        except RepositoryCorrupt as error:
            log.warning(f"{self.what} cannot be understood", backup_id=backup, reason=error.one_line())
            return None

    async def write(self, store: ObjectStore, backup: str, values: Mapping[str, Any]) -> None:
        """Note `values`, unless the base backup is gone. Where nothing may be written, that is told."""
        told = {name: format_time(each) if isinstance(each, datetime) else each for name, each in values.items()}
        try:
            if await store.head(sentinel_key(backup)) is not None:
                await store.put(self.key(backup), json.dumps(told, separators=(",", ":")).encode())
        except RepositoryError as error:
            self.was_not_stored(backup, error)

    def was_not_stored(self, backup: str, error: RepositoryError) -> None:
        """Log that the note could not be written."""
        log.warning(f"{self.what} was not stored", backup_id=backup, reason=error.one_line())
