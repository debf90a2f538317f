"""Reading S3 objects: whether there is one, and its bytes, over as many connections as it takes."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from typing import Any

from botocore.exceptions import ClientError
from botocore.parsers import ResponseParserError

from agent.errors import RepositoryCorrupt, RepositoryUnavailable
from agent.ports import ObjectInfo
from agent.storage.retrying import Retry
from agent.storage.s3_bucket import S3Bucket
from agent.storage.s3_errors import error_code
from agent.storage.s3_shortcuts import parse_time

_PIECE_BYTES = 1 << 20


async def get_object(bucket: S3Bucket, key: str, **options: Any) -> dict[str, Any] | None:
    """Ask for an object; return the answer, its body unread, or None if the store says that there is no such key."""
    async with bucket.request("read", key):
        try:
            return dict(await bucket.client.get_object(**bucket.object(key), **options))
        except ClientError as error:
            if error_code(error) == "NoSuchKey":
                return None
            raise


def object_info(key: str, answer: Mapping[str, Any]) -> ObjectInfo:
    """Return what the answer to GET or HEAD says of the object."""
    metadata = {name.lower(): value for name, value in answer["Metadata"].items()}
    return ObjectInfo(key, answer["ContentLength"], answer["LastModified"].astimezone(UTC), metadata)


def answered_at(answer: Mapping[str, Any]) -> datetime:
    """Return when the store answered, by its own clock; by ours if it does not say so that it can be understood."""
    try:
        return parse_time(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).astimezone(UTC)
    except (KeyError, ResponseParserError):
        return datetime.now(UTC)


def demand_size(key: str, found: int, expected: int) -> None:
    """Raise `RepositoryUnavailable` unless as many bytes were found as there must be."""
    if found != expected:
        raise RepositoryUnavailable(f"object {key} has {expected} bytes, but {found} were received")


class ObjectReader:
    """Yields the bytes of one object. When the connection breaks, reading goes on where it stopped over another one."""

    def __init__(self, bucket: S3Bucket, key: str, answer: dict[str, Any], retry: Retry) -> None:
        """Read on from `answer`, the answer to GET."""
        self._bucket = bucket
        self._key = key
        self._retry = retry
        self._etag = answer["ETag"]
        self._offset = 0
        self._size = object_info(key, answer).size
        self._body: Any | None = answer["Body"]

    def close(self) -> None:
        """Drop the connection if the body is not read to its end."""
        if self._body is not None:
            self._body.close()
            self._body = None

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the object in pieces of at most 1 MiB."""
        while self._offset < self._size:
            piece = await self._retry(self._next_piece)
            self._offset += len(piece)
            yield piece

    async def _next_piece(self) -> bytes:
        if self._body is None:
            self._body = await self._reopened()
        expected = min(_PIECE_BYTES, self._size - self._offset)
        try:
            async with self._bucket.request("read", self._key):
                return bytes(await self._body.content.readexactly(expected))
        except asyncio.IncompleteReadError as error:
            self.close()
            raise RepositoryUnavailable(
                f"object {self._key} ended after {self._offset} of {self._size} bytes"
            ) from error
        except BaseException:
            self.close()
            raise

    async def _reopened(self) -> Any:
        answer = await get_object(self._bucket, self._key, Range=f"bytes={self._offset}-", IfMatch=self._etag)
        if answer is None:
            raise RepositoryCorrupt(f"object {self._key} was removed while it was read")
        if answer["ContentLength"] != self._size - self._offset:
            answer["Body"].close()
            raise RepositoryUnavailable(f"the store did not continue object {self._key} at byte {self._offset}")
        return answer["Body"]
