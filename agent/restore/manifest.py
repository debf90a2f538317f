"""Places PostgreSQL's backup manifest in a hydrated data directory, so that pg_verifybackup can prove it."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import SpooledTemporaryFile

from agent.ports import ObjectStore
from agent.repository.backup_manifest import MANIFEST_FILE, rewritten
from agent.repository.keys import manifest_key
from agent.repository.object_format import ObjectFormat
from agent.restore.wanted import MAP_FILE
from agent.tasks import in_thread

_SPOOL_BYTES = 8 << 20


async def place_manifest(store: ObjectStore, objects: ObjectFormat, backup: str, data_directory: Path) -> None:
    """Write the manifest of `backup` into `data_directory`, if the repository has one; not durable yet.

    The entry of tablespace_map is made to fit the one that is there: tablespaces may have been given other places.

    Raises:
        RepositoryError: It cannot be read, or is damaged.
        OSError: The volume failed, or is full.
    """
    with SpooledTemporaryFile[bytes](_SPOOL_BYTES) as file:
        key = manifest_key(backup)
        decoder = objects.decoder(key, file.write)
        async with store.open(key) as pieces:
            if pieces is None:  # WAL-G makes none
                return
            async for piece in pieces:
                await in_thread(decoder.take, piece)
        await in_thread(decoder.finish)
        file.seek(0)
        await in_thread(_write, file, data_directory)


def _write(lines: Iterable[bytes], data_directory: Path) -> None:
    with (data_directory / MANIFEST_FILE).open("xb") as manifest:
        manifest.writelines(rewritten(lines, dict(_changed(data_directory))))


def _changed(data_directory: Path) -> Iterator[tuple[str, bytes]]:
    if (data_directory / MAP_FILE).exists():
        yield MAP_FILE, (data_directory / MAP_FILE).read_bytes()
