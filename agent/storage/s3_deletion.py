"""Removing S3 objects: a thousand in a request, or one by one where the store has no such request.

On a versioned bucket a deletion hides the object behind a marker; its bytes stay until a lifecycle rule of the bucket
removes them. Versions are left alone on purpose: they are the way back from a mistaken expiry.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import structlog
from botocore.exceptions import ClientError

from agent.errors import RepositoryError, RepositoryRefused
from agent.ports import Deletion
from agent.storage.s3_bucket import S3Bucket
from agent.storage.s3_errors import error_code, refusal
from agent.tasks import task_group

if TYPE_CHECKING:
    from types_aiobotocore_s3.type_defs import ObjectIdentifierTypeDef

_KEYS_PER_REQUEST = 1000  # Source: S3's API reference, DeleteObjects
_SINGLE_REQUESTS = 8
# Codes by which stores and gateways refuse the request that removes many, but not the one that removes one.
_NOT_TOGETHER = frozenset({
    "NotImplemented", "501", "MethodNotAllowed", "405", "InvalidRequest", "InvalidArgument", "MalformedXML",
    "MissingContentMD5", "AccessDenied", "403",
})  # fmt: skip

log = structlog.get_logger()


class ObjectRemover:
    """Removes objects of one bucket. It finds out once in a process whether that can be done for many at a time."""

    def __init__(self, bucket: S3Bucket) -> None:
        self._bucket = bucket
        self._together = True

    async def remove(self, keys: Sequence[str]) -> Deletion:
        """As `ObjectStore.delete_many`."""
        failed: dict[str, RepositoryError] = {}
        keeps_versions = False
        for start in range(0, len(keys), _KEYS_PER_REQUEST):
            deletion = await self._remove_some(keys[start : start + _KEYS_PER_REQUEST])
            failed |= deletion.failed
            keeps_versions |= deletion.keeps_versions
        return Deletion(failed, keeps_versions)

    async def _remove_some(self, keys: Sequence[str]) -> Deletion:
        if self._together:
            try:
                return await self._remove_together(keys)
            except RepositoryRefused as error:
                if not (isinstance(error.__cause__, ClientError) and error_code(error.__cause__) in _NOT_TOGETHER):
                    raise
                log.info("objects are deleted one by one", reason=error.one_line())
                self._together = False
        return await self._remove_singly(keys)

    async def _remove_together(self, keys: Sequence[str]) -> Deletion:
        objects: list[ObjectIdentifierTypeDef] = [{"Key": self._bucket.root + key} for key in keys]
        async with self._bucket.request("delete", keys[0]):
            answer = await self._bucket.client.delete_objects(**self._bucket.bucket(), Delete={"Objects": objects})
        errors = [entry for entry in answer.get("Errors", ()) if entry.get("Code") != "NoSuchKey"]
        failed = {self._key(entry, keys): entry for entry in errors}
        return Deletion(
            {key: refusal(entry, 0, self._bucket.describe("delete", key)) for key, entry in failed.items()},
            any(entry.get("DeleteMarker") for entry in answer.get("Deleted", ())),
        )

    def _key(self, entry: Mapping[str, object], keys: Sequence[str]) -> str:
        return str(entry.get("Key", self._bucket.root + keys[0])).removeprefix(self._bucket.root)

    async def _remove_singly(self, keys: Sequence[str]) -> Deletion:
        failed: dict[str, RepositoryError] = {}
        at_once = asyncio.Semaphore(_SINGLE_REQUESTS)
        markers = 0

        async def remove(key: str) -> None:
            nonlocal markers
            async with at_once:
                try:
                    async with self._bucket.request("delete", key):
                        answer = await self._bucket.client.delete_object(**self._bucket.object(key))
                        markers += bool(answer.get("DeleteMarker"))
                except RepositoryRefused as error:
                    failed[key] = error

        async with task_group() as group:
            for key in keys:
                group.create_task(remove(key), name=f"delete {key}")
        return Deletion(failed, keeps_versions=markers > 0)
