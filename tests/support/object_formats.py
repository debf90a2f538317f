"""Formats of repositories, and reading what was packed in them."""

from agent.environment import Secret
from agent.ports import Body
from agent.repository.object_format import ObjectFormat
from agent.settings import Compression

PLAIN = ObjectFormat(Compression.NONE, None)
ZSTD = ObjectFormat(Compression.ZSTD, None)
LZ4 = ObjectFormat(Compression.LZ4, None)

KEY = Secret(bytes(range(32)))
OTHER_KEY = Secret(bytes(range(1, 33)))


def unpack(objects: ObjectFormat, key: str, body: Body, *, step: int = 1 << 20) -> bytes:
    """Return the plain content of the whole object `key`, taken in pieces of `step` bytes."""
    content = bytearray()
    decoder = objects.decoder(key, content.extend)
    for start in range(0, len(body), step):
        decoder.take(body[start : start + step])
    decoder.finish()
    return bytes(content)
