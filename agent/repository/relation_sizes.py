"""How large relations were when a base backup was taken, from its backup manifest."""

import re
from collections.abc import Collection, Iterable
from tempfile import SpooledTemporaryFile

from agent.domain.file_node import FileNode
from agent.ports import ObjectStore
from agent.repository.keys import manifest_key
from agent.repository.object_format import ObjectFormat
from agent.repository.pieces import take_pieces
from agent.tasks import in_thread

_SPOOL_BYTES = 8 << 20
# The files of 1 GiB that make up a main fork; a tablespace's are below pg_tblspc/OID/PG_...
_LINE = re.compile(
    rb'\{ "Path": "(?:base|global|pg_tblspc/\d+/[^/"]+)/(?:(?P<database>\d+)/)?(?P<number>\d+)(?:\.\d+)?", '
    rb'"Size": (?P<size>\d+)'
)


async def relation_sizes(
    store: ObjectStore, objects: ObjectFormat, backup: str, files: Collection[FileNode]
) -> dict[FileNode, int] | None:
    """Return the bytes of those of `files` that were there when `backup` was taken.

    None if the backup has no manifest: WAL-G makes none.

    Raises:
        RepositoryError: It cannot be read, or is damaged.
    """
    with SpooledTemporaryFile[bytes](_SPOOL_BYTES) as spool:
        key = manifest_key(backup)
        decoder = objects.decoder(key, spool.write)
        if not await take_pieces(store, key, decoder.take):
            return None
        await in_thread(decoder.finish)
        spool.seek(0)
        return await in_thread(sizes_in, spool, files)


def sizes_in(lines: Iterable[bytes], files: Collection[FileNode]) -> dict[FileNode, int]:
    """Return the bytes of `files` as the `lines` of a backup manifest tell them."""
    wanted = {(file.database, file.number): file for file in files}
    found: dict[FileNode, int] = {}
    for line in lines:
        match = _LINE.match(line)
        file = match and wanted.get((int(match["database"] or 0), int(match["number"])))
        if match and file:
            found[file] = found.get(file, 0) + int(match["size"])
    return found
