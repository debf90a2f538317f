"""Unpacks one stored WAL file piece by piece and checks it: cipher, codec, size, header, and its content.

The content is proven by the digest in the object's metadata, by the cipher or by the codec's checksum. A segment that
has none of them (WAL-G's brotli, lzma and none; ours in a store that keeps no metadata) is walked record by record.
"""

from collections.abc import Iterator

from agent.domain.wal import LONG_HEADER_BYTES, MAX_SEGMENT_BYTES, WalFileKind, segment_problem, wal_file_kind
from agent.domain.wal_check import CheckedSegment, RecordCheck
from agent.errors import RepositoryCorrupt
from agent.repository.object_format import ObjectFormat

_MAX_HISTORY_BYTES = 16 << 20  # a line for each timeline before; it is read whole, and must not fill the memory
_HINT = "Restore the object from a copy, or recover to a moment before it."
_KEY_HINT = "If the repository is encrypted, set WALG_LIBSODIUM_KEY; if not, bring back a copy of the object."


class WalContent:
    """Takes a stored WAL file's bytes; yields the plain ones, and says at the end whether they are good.

    What came out before an error is raised is to be thrown away. Blocks: use what it yields in a thread.
    """

    def __init__(
        self,
        name: str,
        key: str,
        objects: ObjectFormat,
        *,
        digest: str | None,
        system_identifier: int | None,
    ) -> None:
        """Begin with the WAL file `name`, stored as `key`.

        Args:
            name: Its PostgreSQL name.
            key: The object's key, for messages.
            objects: How it is packed.
            digest: BLAKE3 (hex) of the plain content, if that is known.
            system_identifier: The database cluster that a segment must be of; None accepts any.
        """
        self.size = 0
        self.records: CheckedSegment | None = None
        """What walking its records found, after `rest`; None if there was no need to."""
        self._name = name
        self._is_segment = wal_file_kind(name) in (WalFileKind.SEGMENT, WalFileKind.PARTIAL)
        self._max_bytes = MAX_SEGMENT_BYTES if self._is_segment else _MAX_HISTORY_BYTES
        self._key = key
        self._unpacker = objects.unpacker(key, has_digest=digest is not None)
        self._digest = digest
        self._system_identifier = system_identifier
        self._hasher = objects.hasher()
        self._record_check: RecordCheck | None = None
        self._head = b""

    def unpack(self, stored: bytes) -> Iterator[bytes]:
        """Take the next stored bytes; yield what they unpack to, in pieces of 1 MiB at most.

        Raises:
            WrongKey: They are not encrypted as the settings say.
            RepositoryCorrupt: They are damaged, or expand beyond any WAL file.
        """
        return map(self._checked, self._unpacker.unpack(stored))

    def rest(self) -> Iterator[bytes]:
        """Yield the rest; end if all was taken and is what it must be.

        Raises:
            RepositoryCorrupt: It is cut short, is not what was archived, or is not the WAL file of this name.
        """
        yield from map(self._checked, self._unpacker.rest())
        self._finish()

    def _checked(self, data: bytes) -> bytes:
        """Return the next plain bytes, having looked at them."""
        if not self.size and self._is_segment and self._digest is None and not self._unpacker.proves_content:
            self._record_check = RecordCheck()
        if len(self._head) < LONG_HEADER_BYTES:
            self._head += data[:LONG_HEADER_BYTES]
        self.size += len(data)
        if self.size > self._max_bytes:
            raise self._corrupt(f"expands to more than {self._max_bytes} bytes")
        self._hasher.update(data)
        if self._record_check is not None:
            self._record_check.take(data)
        return data

    def _finish(self) -> None:
        if self._digest is not None and self._hasher.hexdigest() != self._digest:
            raise self._corrupt("does not have the content that was archived")
        if self._is_segment:
            problem = segment_problem(self._name, self.size, self._head, self._system_identifier)
            if problem is not None:
                raise self._corrupt(f'is not the WAL segment "{self._name}": {problem}')
            if self._record_check is not None:
                self._finish_records(self._record_check)

    def _finish_records(self, check: RecordCheck) -> None:
        try:
            self.records = check.finish()
        except ValueError as error:
            raise self._corrupt(f"cannot be replayed: {error}") from error

    def hexdigest(self) -> str:
        """Return the BLAKE3 digest of what was taken."""
        return self._hasher.hexdigest()

    @property
    def head(self) -> bytes:
        """The first bytes of the plain content, enough for a segment's header."""
        return self._head

    def _corrupt(self, problem: str) -> RepositoryCorrupt:
        hint = _KEY_HINT if self._unpacker.says_nothing_of_a_key else _HINT
        return RepositoryCorrupt(f"object {self._key} {problem}", hint=hint)
