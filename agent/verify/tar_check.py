"""Checks the members of one tar while it is read: names, sizes, CRC32C, page checksums, increments.

Called in threads; memory is some pieces of 1 MiB.
"""

from array import array

import google_crc32c

from agent.domain.backup_file import CorruptBlocks
from agent.domain.page import PAGE_BYTES
from agent.errors import RepositoryCorrupt
from agent.postgres.data_files import relation_file_number
from agent.postgres.page_check import PageRules
from agent.repository.increments import IncrementReader
from agent.repository.tar_reader import Member, MemberKind, path_below
from agent.verify.listed_files import ListedFile, ListedFiles


class _Pages:
    """Verifies the pages of one relation file as they arrive: in order, or where an increment puts them.

    corrupt: those with a wrong checksum.
    """

    def __init__(self, rules: PageRules, segment: int) -> None:
        self.corrupt = CorruptBlocks()
        self._rules = rules
        self._segment = segment
        self._rest = b""
        self._block = 0

    def take(self, data: bytes) -> None:
        """Take the next bytes of the file. What follows the last whole page is no page."""
        data = self._rest + data
        pages = len(data) // PAGE_BYTES
        self._rest = data[pages * PAGE_BYTES :]
        wrong = self._rules.wrong(data, self._segment, self._block)
        if wrong:
            self.corrupt = self.corrupt.and_these([self._block + position for position in wrong])
        self._block += pages

    def put(self, block: int, in_page: int, data: bytes) -> None:
        """Take the next bytes of an increment, which belong into the page `block`, from `in_page` of it on."""
        if not in_page:
            self._block = block
        self.take(data)


class _Increment(IncrementReader):
    """An increment whose pages are verified, if `pages` are."""

    def __init__(self, member_bytes: int, source: str, pages: _Pages | None) -> None:
        super().__init__(member_bytes, source)
        self._pages = pages

    def _page(self, block: int, in_page: int, data: memoryview) -> None:
        if self._pages is not None:
            self._pages.put(block, in_page, bytes(data))


class TarCheck:
    """A `MemberSink` that checks the tar stored as `key`; `problems` are what it found."""

    def __init__(self, listed: ListedFiles, rules: PageRules | None, key: str) -> None:
        """`rules`: those for pages with checksums; None: they have none."""
        self.problems: list[str] = []
        self.arrived = array("I")
        self._listed = listed
        self._rules = rules
        self._key = key
        self._name = ""
        self._kind = MemberKind.OTHER
        self._file: ListedFile | None = None
        self._pages: _Pages | None = None
        self._increment: _Increment | None = None
        self._crc32c = 0
        self._size = 0

    def begin(self, member: Member) -> None:
        """As `MemberSink`."""
        name = self._name = path_below(member.name, self._key)
        self._kind, self._crc32c, self._size = member.kind, 0, 0
        file = self._file = self._listed.find(name)
        segment = relation_file_number(f"/{name}") if member.kind is MemberKind.FILE else None
        self._pages = None if self._rules is None or segment is None else _Pages(self._rules, segment)
        self._increment = None
        if file is not None and file.is_incremented:
            self._increment = _Increment(member.size, f"of {name} in {self._key}", self._pages)

    def write(self, data: memoryview) -> None:
        """As `MemberSink`."""
        if self._file is not None and self._file.is_incremented:
            self._write_increment(data)
            return
        content = bytes(data)
        self._size += len(content)
        if self._file is not None and self._file.crc32c is not None:
            self._crc32c = google_crc32c.extend(self._crc32c, content)
        if self._pages is not None:
            self._pages.take(content)

    def _write_increment(self, data: memoryview) -> None:
        try:
            if self._increment is not None:
                self._increment.write(data)
        except RepositoryCorrupt as error:
            self.problems.append(error.message)
            self._increment = None

    def end(self) -> None:
        """As `MemberSink`."""
        if self._increment is not None:
            try:
                self._increment.finish()
                self._size = self._increment.file_bytes
            except RepositoryCorrupt as error:
                self.problems.append(error.message)
        if self._pages is not None and self._pages.corrupt.count:
            self._tell_corrupt(self._pages.corrupt)
        if self._file is not None:
            self.arrived.append(self._file.position)
            if self._kind is MemberKind.FILE:
                self._compare(self._file)
        elif self._listed.is_complete and self._kind is MemberKind.FILE:
            self.problems.append(f"{self._key} holds {self._name}, which is not listed: it would not be restored")

    def _compare(self, file: ListedFile) -> None:
        has, said = "", ""
        if file.size is not None and self._size != file.size:
            has, said = f"{self._size} bytes", f"{file.size} bytes"
        elif file.crc32c is not None and not file.is_incremented and self._crc32c != file.crc32c:
            has, said = f"the CRC32C {self._crc32c:08x}", f"{file.crc32c:08x}"
        if has:
            self.problems.append(f"{self._name} in {self._key} has {has}, and {said} by the backup manifest")

    def _tell_corrupt(self, blocks: CorruptBlocks) -> None:
        when = ", as when the backup was taken" if self._file is not None and self._file.was_corrupt else ""
        pages = f"{blocks.count} pages" if blocks.count > 1 else "a page"
        first = ", ".join(map(str, blocks.some))
        self.problems.append(f"{self._name} in {self._key} has {pages} with a wrong checksum, block {first}{when}")
