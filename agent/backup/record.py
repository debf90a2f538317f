"""What a base backup says of itself, apart from its sentinel, while it is taken and when it is stored."""

import tempfile
from collections.abc import AsyncGenerator, Generator, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager

from agent.domain.backup_file import PackedFile
from agent.errors import BackupFailed
from agent.ports import BackupStop, ObjectStore
from agent.repository.backup_documents import BackupFacts, FilesMetadataDocument, metadata_document
from agent.repository.backup_manifest import ManifestDocument
from agent.repository.keys import files_metadata_key, manifest_key, metadata_key
from agent.repository.object_format import ObjectFormat
from agent.repository.tar_parts import in_threads
from agent.settings import Compression


class BackupRecord:
    """The files of a base backup as they are packed. Memory does not depend on their number. To be closed.

    All but `close` raise `BackupFailed` if there is no room for temporary files.
    """

    def __init__(self) -> None:
        self._files = FilesMetadataDocument()
        self._manifest = ManifestDocument()

    def add_tar(self, tar: str, files: Sequence[PackedFile]) -> None:
        """Add the tar object `tar` with what was read for it. Blocks; may be called by several threads at once."""
        with _temporary_files():
            self._files.add_tar(tar, files)
            self._manifest.add(files)

    def add_control_file(self, content: bytes) -> None:
        """Add `global/pg_control`."""
        with _temporary_files():
            self._manifest.add_content("global/pg_control", content)

    def add_label_tar(self, tar: str, stop: BackupStop) -> None:
        """Add the tar object that holds the backup label."""
        with _temporary_files():
            self._files.add_label_tar(tar)
            self._manifest.add_content("backup_label", stop.backup_label)
            if stop.tablespace_map:  # else no restore leaves one
                self._manifest.add_content("tablespace_map", stop.tablespace_map)

    async def store(self, store: ObjectStore, objects: ObjectFormat, facts: BackupFacts) -> None:
        """Store backup manifest, `metadata.json` and `files_metadata.json`."""
        manifest = self._manifest.chunks(
            pg_version=facts.pg_version,
            system_identifier=facts.system_identifier,
            timeline=facts.backup().timeline,
            start_lsn=facts.start_lsn,
            stop_lsn=facts.finish_lsn,
        )
        packed = _packed(manifest, objects.compressed_by(Compression.ZSTD))
        with _temporary_files():
            await _store_stream(store, manifest_key(facts.name), packed)
            await store.put(metadata_key(facts.name), metadata_document(facts))
            await _store_stream(store, files_metadata_key(facts.name), self._files.chunks())

    def close(self) -> None:
        """Remove the temporary files."""
        self._files.close()
        self._manifest.close()


@contextmanager
def _temporary_files() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BackupFailed(
            f"the list of files cannot be kept in a temporary file in {tempfile.tempdir or 'TMPDIR'}: {error.strerror}",
            hint="It takes some 300 bytes for each file of the data directory: make room, or set TMPDIR.",
        ) from error


def _packed(chunks: Iterable[bytes], objects: ObjectFormat) -> Generator[bytes, None, None]:
    encoder = objects.encoder()
    for chunk in chunks:
        yield encoder.encode(chunk)
    yield encoder.flush()


async def _store_stream(store: ObjectStore, key: str, chunks: Generator[bytes, None, None]) -> None:
    async def filled() -> AsyncGenerator[bytes, None]:
        async with aclosing(in_threads(chunks)) as made:
            async for chunk in made:
                if chunk:
                    yield chunk

    async with aclosing(filled()) as stream:
        await store.put_stream(key, stream)
