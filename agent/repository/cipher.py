"""Encryption of objects, byte for byte as WAL-G's libsodium crypter: secretstream XChaCha20-Poly1305 in small chunks.

    header (24 bytes), then chunks of 8192 plain bytes, 17 bytes longer when sealed; the last is shorter than the
    others, empty if need be, and alone carries the tag FINAL

An object is never trusted to be whole because it decrypts: cut at a chunk's end it does so without a complaint, and
only the missing FINAL tells. No chunk can be altered, left out, repeated or moved within its object.

Only `agent.repository.object_format` uses this. Source: WAL-G, internal/crypto/libsodium/reader.go and writer.go.
"""

from nacl.bindings import crypto_secretstream_xchacha20poly1305_ABYTES as SEAL_BYTES
from nacl.bindings import crypto_secretstream_xchacha20poly1305_HEADERBYTES as HEADER_BYTES
from nacl.bindings import crypto_secretstream_xchacha20poly1305_init_pull as init_pull
from nacl.bindings import crypto_secretstream_xchacha20poly1305_init_push as init_push
from nacl.bindings import crypto_secretstream_xchacha20poly1305_pull as pull
from nacl.bindings import crypto_secretstream_xchacha20poly1305_push as push
from nacl.bindings import crypto_secretstream_xchacha20poly1305_state as SecretStream  # noqa: N812 - it is a class
from nacl.bindings import crypto_secretstream_xchacha20poly1305_TAG_FINAL as TAG_FINAL
from nacl.bindings import crypto_secretstream_xchacha20poly1305_TAG_MESSAGE as TAG_MESSAGE
from nacl.exceptions import RuntimeError as OpenFailed  # its other errors are of wrong types: bugs here

from agent.errors import RepositoryCorrupt, WrongKey
from agent.ports import Body

CHUNK_BYTES = 8192
SEALED_BYTES = CHUNK_BYTES + SEAL_BYTES


class Encryptor:
    """Encrypts one object piece by piece, with a key of 32 bytes. Not for use by two threads at once.

    Blocks for about 1 ms per MiB. What is held between two calls is less than a chunk.
    """

    def __init__(self, key: bytes) -> None:
        self._state = SecretStream()
        self._header = init_push(self._state, key)
        self._rest = bytearray()

    def encrypt(self, data: Body) -> bytes:
        """Take `data`; return what is ready: whole chunks."""
        view, sealed = memoryview(data), [self._take_header()]
        begun = min(-len(self._rest) % CHUNK_BYTES, len(view))
        self._rest += view[:begun]
        if len(self._rest) == CHUNK_BYTES:
            sealed.append(push(self._state, bytes(self._rest)))
            self._rest.clear()
        end = begun + (len(view) - begun) // CHUNK_BYTES * CHUNK_BYTES
        starts = range(begun, end, CHUNK_BYTES)
        sealed.extend(push(self._state, bytes(view[start : start + CHUNK_BYTES])) for start in starts)
        self._rest += view[end:]
        return b"".join(sealed)

    def flush(self) -> bytes:
        """End the object; return the rest of it. The encryptor cannot be used afterwards."""
        return self._take_header() + push(self._state, bytes(self._rest), None, TAG_FINAL)

    def _take_header(self) -> bytes:
        header, self._header = self._header, b""
        return header


class Decryptor:
    """Decrypts one object, which messages call `source`, piece by piece. Not for use by two threads at once.

    The caller must call `finish` before it trusts what came out.
    """

    def __init__(self, key: bytes, source: str) -> None:
        self._key = key
        self._source = source
        self._state: SecretStream | None = None
        self._rest = bytearray()
        self._is_right_key = False

    def decrypt(self, data: Body) -> bytes:
        """Take `data`; return the plain bytes of every chunk that is complete.

        Raises:
            WrongKey: The first chunk cannot be opened.
            RepositoryCorrupt: A later one cannot.
        """
        self._rest += data
        if self._state is None:
            if len(self._rest) < HEADER_BYTES:
                return b""
            self._state = self._begin()
        sealed, end = memoryview(self._rest), len(self._rest) // SEALED_BYTES * SEALED_BYTES
        plain = [
            self._open(self._state, bytes(sealed[start : start + SEALED_BYTES]), TAG_MESSAGE)
            for start in range(0, end, SEALED_BYTES)
        ]
        sealed.release()
        del self._rest[:end]
        return b"".join(plain)

    def finish(self) -> bytes:
        """Return the plain bytes of the last chunk.

        Raises:
            WrongKey: It is the only one, and cannot be opened.
            RepositoryCorrupt: The object is cut short, or its last chunk is damaged.
        """
        if self._state is None or len(self._rest) < SEAL_BYTES:
            raise self._corrupt("ends too early")
        return self._open(self._state, bytes(self._rest), TAG_FINAL)

    def _begin(self) -> SecretStream:
        state = SecretStream()
        init_pull(state, bytes(self._rest[:HEADER_BYTES]), self._key)
        del self._rest[:HEADER_BYTES]
        return state

    def _open(self, state: SecretStream, sealed: bytes, expected_tag: int) -> bytes:
        try:
            plain, tag = pull(state, sealed)
        except OpenFailed as error:
            if self._is_right_key:
                raise self._corrupt("is damaged or cut short") from error
            raise WrongKey(
                f"{self._source} was not encrypted with this key, or its beginning is damaged",
                hint="Set WALG_LIBSODIUM_KEY (or _KEY_PATH) and WALG_LIBSODIUM_KEY_TRANSFORM as when it was stored.",
            ) from error
        self._is_right_key = True
        if tag != expected_tag:
            raise self._corrupt("ends where it should not" if tag == TAG_FINAL else "ends too early")
        return plain

    def _corrupt(self, problem: str) -> RepositoryCorrupt:
        return RepositoryCorrupt(
            f"the encrypted stream of {self._source} {problem}",
            hint="The object was damaged or cut short after it was stored; bring back an intact copy of it.",
        )
