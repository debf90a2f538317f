"""The `pg_control` that a base backup holds."""

from agent.errors import RepositoryCorrupt
from agent.ports import ObjectStore
from agent.repository.backups import list_tars
from agent.repository.object_format import ObjectFormat
from agent.repository.tar_reader import Member, read_tar

_TAR = "pg_control.tar"
_MAX_BYTES = 64 << 10


class _ControlFileSink:
    """Keeps the content of the member called pg_control."""

    def __init__(self) -> None:
        self.content = bytearray()
        self._wanted = False

    def begin(self, member: Member) -> None:
        """As `MemberSink`."""
        self._wanted = member.name.endswith("global/pg_control") and member.size <= _MAX_BYTES

    def write(self, data: memoryview) -> None:
        """As `MemberSink`."""
        if self._wanted:
            self.content += data

    def end(self) -> None:
        """As `MemberSink`."""
        self._wanted = False


async def read_backup_control_file(store: ObjectStore, objects: ObjectFormat, name: str) -> bytes:
    """Return the content of `global/pg_control` in the base backup `name`.

    Raises:
        RepositoryCorrupt: There is none, or its tar is damaged.
        RepositoryError: It could not be read.
    """
    key = next((tar.key for tar in await list_tars(store, name) if tar.key.rpartition("/")[2].startswith(_TAR)), None)
    sink = _ControlFileSink()
    if key is not None:
        await read_tar(store, key, objects, sink, lambda _: None)
    if not sink.content:
        raise RepositoryCorrupt(f"base backup {name} holds no pg_control", hint="Use another backup.")
    return bytes(sink.content)
