"""The codecs of WAL-G's objects: what is written, and what is understood.

Compression is never trusted to notice its own end: a stream that stops early, or goes on after its end, is
`RepositoryCorrupt`. Most libraries return what they have got so far without an error. A flipped bit is noticed by the
codecs that carry a checksum (zstd, lz4 and gz as written by us and by WAL-G); lzma, brotli and none carry none.

Only `agent.repository.object_format` uses this.
"""

import functools
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import brotli
import lz4.frame

from agent.errors import RepositoryCorrupt
from agent.ports import Body
from agent.settings import Compression

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PIECE_BYTES = 1 << 20
# The libraries copy what they do not take at once, and what they give; in the processor's cache that costs little.
_FED_BYTES = 64 << 10
_LZMA_DICTIONARY_BYTES = 8 << 20
_LZ4_HEADER_BYTES = 7  # magic, flags, block descriptor, their checksum; without content size and dictionary
_LZ4_CHECKSUM_BYTES = 4
# What a hostile header may make the decoder allocate; WAL-G's own dictionary needs 9 MiB.
_LZMA_MEMORY_LIMIT = 128 << 20
_DAMAGE = (zstd.ZstdError, lzma.LZMAError, zlib.error, brotli.error, EOFError, RuntimeError)  # lz4: RuntimeError


class Compressor(Protocol):
    """Compresses one object piece by piece. Not for use by two threads at once."""

    def compress(self, data: Body, /) -> bytes:
        """Take `data`; return what is ready, often nothing."""

    def flush(self) -> bytes:
        """End the stream; return the rest of it. The compressor cannot be used afterwards."""


class _Stream(Protocol):
    """What lzma, zstd and lz4 have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes | None: ...
    def decompress(self, data: Body, /, max_length: int = -1) -> bytes: ...


class Decompressor:
    """Decompresses one object piece by piece. Not for use by two threads at once.

    `finished` tells whether the bytes so far are a whole object. The caller must see it True, or call `finish`, before
    it trusts what came out.
    """

    def __init__(self, method: str, source: str, *, checksum: bool = True) -> None:
        """Begin an object that messages call `source`; without `checksum` lz4's is passed over: see `_UncheckedLz4`."""
        self._method = method
        self._source = source
        self._stream = _STREAMS[method]() if checksum or method != Compression.LZ4 else _UncheckedLz4()
        self.finished = method == Compression.NONE

    def pieces(self, data: Body) -> Iterator[bytes]:
        """Take `data`; yield what it decompresses to, in pieces of 1 MiB at most, 2 of brotli, however far.

        Raises:
            RepositoryCorrupt: The stream is damaged, or goes on after its end.
        """
        rest = memoryview(data)
        while len(rest):
            if self.finished:
                self._begin_next_frame()
            fed = rest[:_FED_BYTES]
            yield from self._one_frame(fed)
            left = len(self._stream.unused_data or b"") if self.finished else 0
            rest = rest[len(fed) - left :]

    def finish(self) -> None:
        """Return if the object was whole, else raise `RepositoryCorrupt`."""
        if not self.finished:
            raise self._corrupt("ends too early")

    def _begin_next_frame(self) -> None:
        if self._method not in _CONCATENATED:
            raise self._corrupt("goes on after its end")
        self._stream = _STREAMS[self._method]()
        self.finished = False

    def _one_frame(self, data: Body) -> Iterator[bytes]:
        while True:
            try:
                piece = self._stream.decompress(data, PIECE_BYTES)
            except _DAMAGE as error:
                raise self._corrupt("is damaged") from error
            if piece:
                yield piece
            if self._stream.eof:
                self.finished = True
                return
            if self._stream.needs_input:
                return
            data = b""

    def _corrupt(self, problem: str) -> RepositoryCorrupt:
        return RepositoryCorrupt(
            f"the {self._method} stream of {self._source} {problem}",
            hint="The object was damaged or cut short after it was stored; bring back an intact copy of it.",
        )


@dataclass(frozen=True, slots=True)
class Codec:
    """One way of compressing objects: `method` as in WALG_COMPRESSION_METHOD, `extension` with its dot, or empty."""

    method: str
    extension: str

    @property
    def magic(self) -> bytes:
        """What its streams begin with; empty where that is not fixed."""
        return _MAGIC.get(self.method, b"")

    def compressor(self, *, checksum: bool = True, apart: bool = False) -> Compressor:
        """Begin to compress an object. Its memory is bounded: about 15 MiB at most (lzma), 3 MiB with zstd or lz4.

        Args:
            checksum: With one of the content at its end, if the codec has any.
            apart: The pieces are large, 1 MiB or so: zstd then makes a frame of each.
        """
        if apart and self.method == Compression.ZSTD:
            return _ZstdFrames(checksum)
        return _COMPRESSORS[self.method](checksum)

    def has_checksum(self, start: bytes) -> bool:
        """Tell whether a stream that begins with these five bytes carries a checksum of its content.

        Source: Zstandard Compression Format, "Frame_Header_Descriptor"; LZ4 Frame Format Description, "FLG byte"; gzip
        always has one.
        """
        return self.method == "gz" or (self.method in ("zstd", "lz4") and len(start) > 4 and bool(start[4] & 0x04))

    def decompressor(self, source: str = "an object", *, checksum: bool = True) -> Decompressor:
        """Begin to decompress the object that messages call `source`.

        Without `checksum` the stream's own may be passed over: the caller has a digest of the content.
        """
        return Decompressor(self.method, source, checksum=checksum)


class _Lz4Compressor:
    """One frame: independent blocks of 256 KiB, no content size.

    WAL-G's blocks of 4 MiB pack 1 % better, and cost a copy of everything that comes in smaller pieces.
    """

    def __init__(self, checksum: bool) -> None:
        self._frame = lz4.frame.LZ4FrameCompressor(
            block_size=lz4.frame.BLOCKSIZE_MAX256KB, block_linked=False, content_checksum=checksum
        )
        self._header: bytes = self._frame.begin()

    def compress(self, data: Body, /) -> bytes:
        header, self._header = self._header, b""
        return header + bytes(self._frame.compress(data))

    def flush(self) -> bytes:
        return self._header + bytes(self._frame.flush())


class _BrotliCompressor:
    def __init__(self) -> None:
        self._stream = brotli.Compressor(quality=3)

    def compress(self, data: Body, /) -> bytes:
        return bytes(self._stream.process(data))

    def flush(self) -> bytes:
        return bytes(self._stream.finish())


class _PlainCompressor:
    def compress(self, data: Body, /) -> bytes:
        return bytes(data)

    def flush(self) -> bytes:
        return b""


def _zstd_options(checksum: bool) -> dict[int, int]:
    parameter = zstd.CompressionParameter
    return {parameter.compression_level: 1, parameter.checksum_flag: checksum, parameter.content_size_flag: 0}


class _ZstdFrames:
    """A frame for each piece, compressed where it lies: a stream would copy it, and search its window in two halves.

    The hash table is small, for the processor's cache; that is made up for by shorter matches.
    """

    def __init__(self, checksum: bool) -> None:
        parameter = zstd.CompressionParameter
        options = {**_zstd_options(checksum), parameter.hash_log: 12, parameter.min_match: 5}
        self._compressor = zstd.ZstdCompressor(options=options)
        self._is_empty = True

    def compress(self, data: Body, /) -> bytes:
        self._is_empty = False
        return self._compressor.compress(data, self._compressor.FLUSH_FRAME)

    def flush(self) -> bytes:
        return self._compressor.flush() if self._is_empty else b""


def _lzma_compressor() -> Compressor:
    # Preset 1: a segment of 16 MiB in tenths of a second rather than seconds; archiving has to keep up.
    filters = [{"id": lzma.FILTER_LZMA1, "preset": 1, "dict_size": _LZMA_DICTIONARY_BYTES}]
    return lzma.LZMACompressor(format=lzma.FORMAT_ALONE, filters=filters)


class _UncheckedLz4:
    """One frame of lz4 whose content checksum is not computed: for content that a stronger digest proves.

    xxHash32 takes longer than decompressing does, and the library cannot be told to leave it out. So the frame gets a
    header that announces no checksum, and the bytes of the checksum are taken off its end.
    """

    def __init__(self) -> None:
        self._stream = lz4.frame.LZ4FrameDecompressor()
        self._head: bytes | None = b""
        self._checksum = b""
        self._checksum_bytes = 0

    @property
    def eof(self) -> bool:
        return self._stream.eof and len(self._checksum) >= self._checksum_bytes

    @property
    def needs_input(self) -> bool:
        return self._stream.eof or bool(self._stream.needs_input)

    @property
    def unused_data(self) -> bytes:
        return self._checksum[self._checksum_bytes :]

    def decompress(self, data: Body, /, max_length: int = -1) -> bytes:
        if self._stream.eof:
            self._checksum += bytes(data)
            return b""
        if self._head is not None:
            self._head += bytes(data)
            if len(self._head) < _LZ4_HEADER_BYTES:
                return b""
            data, self._head = self._without_checksum(self._head), None
        piece = bytes(self._stream.decompress(data, max_length))
        if self._stream.eof:
            self._checksum = self._stream.unused_data or b""
        return piece

    def _without_checksum(self, data: bytes) -> bytes:
        header = _lz4_header(data[4], data[5])
        if header is None or header[0] != data[:_LZ4_HEADER_BYTES]:
            return data  # of another kind: it is read as it is
        self._checksum_bytes = _LZ4_CHECKSUM_BYTES
        return header[1] + data[_LZ4_HEADER_BYTES:]


@functools.cache
def _lz4_header(flags: int, block_descriptor: int) -> tuple[bytes, bytes] | None:
    """Return the header with these two bytes and content checksum, and its like without one; None if it has more to it.

    Source: LZ4 Frame Format Description, "Frame Descriptor".
    """
    if flags & ~0x20 != 0x44 or block_descriptor & 0x8F or not block_descriptor & 0x40:
        return None

    def header(*, checksum: bool) -> bytes:
        options = {"block_size": block_descriptor >> 4, "block_linked": not flags & 0x20, "content_checksum": checksum}
        return bytes(lz4.frame.LZ4FrameCompressor(**options).begin())

    return header(checksum=True), header(checksum=False)


class _BrotliStream:
    unused_data = b""  # the library itself refuses bytes after the end

    def __init__(self) -> None:
        self._stream = brotli.Decompressor()
        self._may_hold_more = False

    @property
    def eof(self) -> bool:
        return bool(self._stream.is_finished())

    @property
    def needs_input(self) -> bool:
        # Where the output was cut at its limit the library says that it accepts more data, yet holds back the rest.
        return not self._may_hold_more and bool(self._stream.can_accept_more_data())

    def decompress(self, data: Body, /, max_length: int = -1) -> bytes:
        piece = bytes(self._stream.process(data, output_buffer_limit=max_length))
        self._may_hold_more = len(piece) >= max_length
        return piece


class _GzipStream:
    def __init__(self) -> None:
        self._stream = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def needs_input(self) -> bool:
        return not self._stream.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data

    def decompress(self, data: Body, /, max_length: int = -1) -> bytes:
        return self._stream.decompress(self._stream.unconsumed_tail or data, max_length)


class _PlainStream:
    """Every piece is complete in itself."""

    eof = True
    needs_input = True
    unused_data = b""

    def decompress(self, data: Body, /, max_length: int = -1) -> bytes:  # noqa: ARG002 - as long as what came in
        return bytes(data)


_COMPRESSORS: dict[str, Callable[[bool], Compressor]] = {
    "zstd": lambda checksum: zstd.ZstdCompressor(options=_zstd_options(checksum)),
    "lz4": _Lz4Compressor,
    "lzma": lambda _: _lzma_compressor(),
    "brotli": lambda _: _BrotliCompressor(),
    "none": lambda _: _PlainCompressor(),
}
_STREAMS: dict[str, Callable[[], _Stream]] = {
    "zstd": zstd.ZstdDecompressor,
    "lz4": lz4.frame.LZ4FrameDecompressor,
    "lzma": lambda: lzma.LZMADecompressor(format=lzma.FORMAT_ALONE, memlimit=_LZMA_MEMORY_LIMIT),
    "brotli": _BrotliStream,
    "gz": _GzipStream,
    "none": _PlainStream,
}
# Of lzma it is the properties byte of every usual encoder, and a dictionary of whole 64 KiB.
_MAGIC = {"zstd": b"\x28\xb5\x2f\xfd", "lz4": b"\x04\x22\x4d\x18", "lzma": b"\x5d\0\0", "gz": b"\x1f\x8b\x08"}
_CONCATENATED = ("zstd", "gz", "none")

# A bare dot at the end of a name is how WAL-G 3.0.8 wrote the method none.
_METHODS = {
    ".zst": "zstd", ".lz4": "lz4", ".lzma": "lzma", ".br": "brotli", ".gz": "gz", "": "none", ".": "none"
}  # fmt: skip

WAL_EXTENSIONS: tuple[str, ...] = tuple(_METHODS)
"""Every ending that an object holding a WAL file, or a tar, may have after the file's own name."""

# Names that end like this have no codec's extension.
_PLAIN_ENDINGS = (".tar", ".history", ".backup", ".partial")


def codec_for(method: Compression) -> Codec:
    """Return the codec that writes `method`."""
    return next(Codec(known, extension) for extension, known in _METHODS.items() if known == method)


def codec_of(object_name: str) -> Codec:
    """Return the codec of an object by the last extension of its name; no extension means uncompressed.

    Raises:
        RepositoryCorrupt: The extension is of no codec known here.
    """
    base = object_name.rpartition("/")[2]
    dot = base.rfind(".")
    extension = "" if dot < 0 or base.endswith(_PLAIN_ENDINGS) else base[dot:]
    if extension not in _METHODS:
        raise RepositoryCorrupt(
            f"{object_name} has the extension {extension} of no known codec",
            hint="Known ones are .zst, .lz4, .lzma, .br and .gz; remove the object if it is none of the repository's.",
        )
    return Codec(_METHODS[extension], extension)
