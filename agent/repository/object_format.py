"""How a repository's objects are packed: compressed, and encrypted where there is a key. The one place that knows both.

Whoever packs or unpacks an object does it through an `ObjectFormat`, so that nobody can forget the cipher; that nobody
else imports the codecs or the cipher is a contract in `pyproject.toml`. All tars and all WAL files are packed like
this; the JSON objects of base backups are plain. No name tells whether an object is encrypted: all of a repository
are, with one key, or none.
"""

from collections.abc import Callable, Iterator

from blake3 import blake3

from agent.environment import Secret
from agent.errors import RepositoryCorrupt, WrongKey
from agent.ports import Body
from agent.repository.cipher import Decryptor, Encryptor
from agent.repository.codecs import PIECE_BYTES, WAL_EXTENSIONS, Codec, Compressor, codec_for, codec_of
from agent.settings import Compression

_DIGEST_CONTEXT = "postgres-pitr: digest of the plain content of an encrypted object"

_START_BYTES = 5  # of a stream: its magic, and what it has to say of checksums

EXTENSIONS = WAL_EXTENSIONS
"""Every ending that an object holding a WAL file, or a tar, may have after the file's own name."""


class ObjectFormat:
    """Packs objects by one compression method, and unpacks those of any; encrypted with one key, or not at all."""

    def __init__(self, compression: Compression, encryption_key: Secret[bytes] | None) -> None:
        self._codec = codec_for(compression)
        self._key = encryption_key
        self.extension = self._codec.extension
        """What the names of objects packed like this end in, with its dot; empty if they are not compressed."""

    def compressed_by(self, compression: Compression) -> "ObjectFormat":
        """Return the format with the same key and another compression method, for objects of a fixed name."""
        return ObjectFormat(compression, self._key)

    def encoder(self, *, checksum: bool = True, apart: bool = False) -> "Encoder":
        """Begin to pack an object. Its memory is bounded: that of `Codec.compressor`, as is what `apart` means.

        Without `checksum` a flipped bit is noticed only by whoever has a digest of the content. That saves a third of
        the work with lz4, whose XXH32 is slow in the library's builds.
        """
        return Encoder(self._codec.compressor(checksum=checksum, apart=apart), self._key)

    def encode(self, data: Body) -> bytes:
        """Pack a whole object. Blocks for some milliseconds per MiB."""
        encoder, view = self.encoder(), memoryview(data)
        pieces = [encoder.encode(view[start : start + PIECE_BYTES]) for start in range(0, len(view), PIECE_BYTES)]
        return b"".join([*pieces, encoder.flush()])

    def hasher(self) -> blake3:
        """Begin the BLAKE3 digest of an object's plain content, as its metadata shows it.

        With a key it is keyed: a plain one would tell whoever may list the bucket that a guess at the content is right.
        """
        if self._key is None:
            return blake3()
        return blake3(key=blake3(self._key.reveal(), derive_key_context=_DIGEST_CONTEXT).digest())

    def unpacker(self, key: str, *, has_digest: bool = False) -> "Unpacker":
        """Begin to unpack the object stored as `key`.

        With `has_digest` the caller compares the content's digest, and a weaker checksum may be passed over.

        Raises:
            RepositoryCorrupt: The name has the extension of no known codec.
        """
        return Unpacker(key, codec_of(key), self._key, has_digest=has_digest)

    def decoder(self, key: str, write: Callable[[bytes], object]) -> "Decoder":
        """Begin to unpack the object stored as `key`; `write` will be called with its plain bytes, in order.

        Raises:
            RepositoryCorrupt: The name has the extension of no known codec.
        """
        return Decoder(self.unpacker(key), write)


class Encoder:
    """Packs one object piece by piece. Not for use by two threads at once; blocks, so use it in a thread."""

    def __init__(self, compressor: Compressor, encryption_key: Secret[bytes] | None) -> None:
        self._compressor = compressor
        self._encryptor = None if encryption_key is None else Encryptor(encryption_key.reveal())

    def encode(self, data: Body) -> bytes:
        """Take `data`; return what is ready, often nothing."""
        packed = self._compressor.compress(data)
        return packed if self._encryptor is None else self._encryptor.encrypt(packed)

    def flush(self) -> bytes:
        """End the object; return the rest of it. The encoder cannot be used afterwards."""
        packed = self._compressor.flush()
        return packed if self._encryptor is None else self._encryptor.encrypt(packed) + self._encryptor.flush()


class Decoder:
    """Unpacks one object piece by piece. Not for use by two threads at once; blocks, so use it in a thread.

    What was written is not to be trusted before `finish` has returned: the end of the object may be missing.
    """

    def __init__(self, unpacker: "Unpacker", write: Callable[[bytes], object]) -> None:
        self._unpacker = unpacker
        self._write = write

    def take(self, data: Body) -> None:
        """Take the next stored bytes; write what they unpack to. Raises as `Unpacker.unpack`."""
        for piece in self._unpacker.unpack(data):
            self._write(piece)

    def finish(self) -> None:
        """Write the rest; return if the object was whole. Raises as `Unpacker.rest`."""
        for piece in self._unpacker.rest():
            self._write(piece)


class Unpacker:
    """Unpacks one object piece by piece. Not for use by two threads at once; blocks, so use it in a thread.

    What came out is not to be trusted before `rest` is exhausted: the end of the object may be missing.
    """

    def __init__(self, key: str, codec: Codec, encryption_key: Secret[bytes] | None, *, has_digest: bool) -> None:
        self._key = key
        self._codec = codec
        self._decryptor = None if encryption_key is None else Decryptor(encryption_key.reveal(), key)
        self._decompressor = codec.decompressor(key, checksum=not has_digest)
        self._start = b""
        self.says_nothing_of_a_key = encryption_key is None and codec.method == Compression.NONE
        """Whether what is taken comes out as it is: if the object is encrypted, this does not notice."""

    @property
    def proves_content(self) -> bool:
        """Whether no damage can go unnoticed: it is sealed, or its first bytes announce a checksum of the content."""
        return self._decryptor is not None or self._codec.has_checksum(self._start)

    def unpack(self, data: Body) -> Iterator[bytes]:
        """Take the next stored bytes; yield what they unpack to, in pieces as `Decompressor.pieces`.

        Raises:
            WrongKey: The object was encrypted with another key, or only one of it and the settings has a key.
            RepositoryCorrupt: It is damaged, or goes on after its end.
        """
        if len(self._start) < _START_BYTES:
            self._start += bytes(data[:_START_BYTES])
        return self._unpacked(data, is_last=False)

    def rest(self) -> Iterator[bytes]:
        """Yield the rest; end if the object was whole.

        Raises:
            WrongKey: As `unpack`.
            RepositoryCorrupt: It is damaged, or cut short.
        """
        return self._unpacked(b"", is_last=True)

    def _unpacked(self, data: Body, *, is_last: bool) -> Iterator[bytes]:
        try:
            if self._decryptor is not None:
                data = self._decryptor.finish() if is_last else self._decryptor.decrypt(data)
            yield from self._decompressor.pieces(data)
            if is_last:
                self._decompressor.finish()
        except RepositoryCorrupt as error:
            raise self._explained(error) from error

    def _explained(self, error: RepositoryCorrupt) -> RepositoryCorrupt:
        """Return the error to raise instead of `error`: what an object begins with may tell what the settings lack."""
        magic = self._codec.magic
        looks_plain = bool(magic) and self._start.startswith(magic)
        if self._decryptor is not None and looks_plain and isinstance(error, WrongKey):
            return WrongKey(
                f"{self._key} is not encrypted, but WALG_LIBSODIUM_KEY or WALG_LIBSODIUM_KEY_PATH is set",
                hint="Unset it, or use the repository that was written with that key: one repository, one key.",
            )
        if self._decryptor is None and not looks_plain and len(self._start) >= len(magic):
            return WrongKey(
                f"{self._key} is no {self._codec.method} stream: it is encrypted, but no key is set, or it is damaged",
                hint="Set WALG_LIBSODIUM_KEY (or _KEY_PATH) and WALG_LIBSODIUM_KEY_TRANSFORM as when it was stored.",
            )
        return error
