"""Checksums that go with a body, for the store to compare with what it received."""

import asyncio
import hashlib
from base64 import b64encode
from typing import Any

import google_crc32c


async def crc32c_of(body: bytes) -> int:
    """Return the CRC32C of `body`; a large one is read in a thread."""
    if len(body) < 1 << 16:
        return int(google_crc32c.value(body))
    return int(await asyncio.to_thread(google_crc32c.value, body))


def crc32c_header(crc32c: int) -> dict[str, Any]:
    """Return the argument of a request that states a body's CRC32C."""
    return {"ChecksumCRC32C": b64encode(crc32c.to_bytes(4, "big")).decode()}


async def md5_header(body: bytes | bytearray) -> dict[str, Any]:
    """Return the argument of a request that states a body's MD5, for stores that do not know CRC32C."""
    digest = await asyncio.to_thread(hashlib.md5, body, usedforsecurity=False)
    return {"ContentMD5": b64encode(digest.digest()).decode()}
