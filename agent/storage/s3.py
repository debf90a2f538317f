"""`ObjectStore` on S3 and on what speaks its language. With its neighbours `s3_*`, the only user of aiobotocore.

Invariants:

- "Absent" is said only of an answer that names the key as missing (`NoSuchKey`). A bare 404, as HEAD gives it for a
  missing bucket as well, is asked about again; 403 is never "absent".
- An object becomes visible whole: by one PUT, or by completing a multipart upload whose parts are all acknowledged.
- Every body travels with a checksum that the store compares: CRC32C, or MD5 where CRC32C is not understood. The
  signature does not cover bodies: SHA-256 costs more than compressing them, and TLS protects them on the way.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import structlog
from botocore.exceptions import ClientError

from agent.errors import RepositoryError, RepositoryRefused, RepositoryUnavailable
from agent.ports import Body, DeletedVersion, Deletion, ObjectInfo, OpenObject, StoredObject
from agent.settings import S3Settings
from agent.storage.retrying import Retry
from agent.storage.s3_bucket import S3Bucket, TimeLimits
from agent.storage.s3_checksums import crc32c_header, crc32c_of, md5_header
from agent.storage.s3_deletion import ObjectRemover
from agent.storage.s3_errors import ABOUT_CREDENTIALS, EXISTS, error_code
from agent.storage.s3_reading import ObjectReader, answered_at, demand_size, get_object, object_info
from agent.storage.s3_upload import PART_BYTES, MultipartUpload, Part, abort_abandoned, gather_parts
from agent.tasks import task_group

_UNEXPLAINED = frozenset({"NoSuchKey", "400", "403", "404"})
# The last one after a write that was accepted: something between us and the store drops the header that was signed.
_NOT_UNDERSTOOD = frozenset({"NotImplemented", "501", "InvalidArgument", "InvalidRequest", "SignatureDoesNotMatch"})

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Features:
    """What the store turned out to understand: CRC32C checksums, and `If-None-Match: *` on PUT."""

    crc32c: bool
    conditional_put: bool


class S3ObjectStore:
    """The objects below one prefix of a bucket."""

    def __init__(self, bucket: S3Bucket, retry: Retry) -> None:
        """Use `connect`."""
        self._bucket = bucket
        self._retry = retry
        self._remover = ObjectRemover(bucket)
        self._features: _Features | None = None
        self._conditional_completion: bool | None = None
        self._tells_versions = True
        self._swept = False
        self._probing = asyncio.Lock()
        self._writing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @classmethod
    async def connect(cls, settings: S3Settings, retry: Retry, limits: TimeLimits | None = None) -> "S3ObjectStore":
        """Prepare the store without asking it anything; `retry` repeats the single requests that make up a stream.

        Raises:
            RepositoryRefused: The endpoint is unusable, or there are no credentials.
        """
        return cls(await S3Bucket.connect(settings, limits or TimeLimits()), retry)

    async def close(self) -> None:
        """As `ObjectStore`."""
        await self._bucket.close()

    def credentials_expire_at(self) -> datetime | None:
        """Return when the credentials expire that requests are signed with; None if they do not, as far as is known."""
        return self._bucket.credentials_expire_at()

    async def put_if_absent(self, key: str, body: Body, *, metadata: Mapping[str, str] | None = None) -> bool:
        """As `ObjectStore`.

        A store without conditional writes is asked first and then written to: atomic among the callers in this
        process, not against other writers.
        """
        features = await self._probed()
        if features.conditional_put:
            return await self._put(key, bytes(body), features, metadata, if_absent=True)
        async with self._writing.setdefault(key, asyncio.Lock()):
            return await self.head(key) is None and await self._put(key, bytes(body), features, metadata)

    async def put(self, key: str, body: Body, *, metadata: Mapping[str, str] | None = None) -> None:
        """As `ObjectStore`."""
        await self._put(key, bytes(body), await self._probed(), metadata)

    async def put_stream(
        self, key: str, chunks: AsyncIterator[Body], *, metadata: Mapping[str, str] | None = None
    ) -> int:
        """As `ObjectStore`. One PUT if it is shorter than a part, else a multipart upload."""
        async with aclosing(gather_parts(key, chunks)) as parts:
            gathered = [await anext(parts)]
            size = len(gathered[0].body)
            if size < PART_BYTES:
                await self._retry(partial(self.put, key, gathered[0].body, metadata=metadata))
                return size
            stored = await self._send(key, _chained(gathered, parts), metadata)
        assert stored is not None, "what replaces is not refused"
        return stored

    async def put_stream_if_absent(
        self, key: str, chunks: AsyncIterator[Body], *, metadata: Mapping[str, str] | None = None
    ) -> int | None:
        """As `ObjectStore`. A store that completes no upload conditionally is asked first, as in `put_if_absent`."""
        async with aclosing(gather_parts(key, chunks)) as parts:
            gathered = [await anext(parts)]
            size = len(gathered[0].body)
            if size < PART_BYTES:
                is_new = await self._retry(partial(self.put_if_absent, key, gathered[0].body, metadata=metadata))
                return size if is_new else None
            all_parts = _chained(gathered, parts)
            # One at a time, also where the store completes conditionally: SeaweedFS lets two through that come at once.
            async with self._writing.setdefault(key, asyncio.Lock()):
                if await self.is_conditional():
                    return await self._send(key, all_parts, metadata, if_absent=True)
                is_new = await self._retry(partial(self.head, key)) is None
                return await self._send(key, all_parts, metadata) if is_new else None

    async def _send(
        self, key: str, parts: AsyncIterator[Part], metadata: Mapping[str, str] | None, *, if_absent: bool = False
    ) -> int | None:
        """Store `parts` as one object; return its size, or None if it exists and `if_absent`."""
        features = await self._retry(self._probed)
        upload = MultipartUpload(self._bucket, key, self._retry, crc32c=features.crc32c)
        async with task_group() as group:
            sweeping = group.create_task(self._sweep(), name="give up abandoned uploads")
            size = await upload.send(parts, metadata or {}, if_absent=if_absent)
            sweeping.cancel()  # nobody waits for it: what is left, the next upload goes on with
        if size is not None:
            stored = await self._retry(partial(self.head, key))
            demand_size(key, 0 if stored is None else stored.size, size)
        return size

    async def _sweep(self) -> None:
        """Give up abandoned uploads beside an upload of ours, once in a process, and by one task."""
        if not self._swept:
            self._swept = True
            try:
                await abort_abandoned(self._bucket)
            except asyncio.CancelledError:
                self._swept = False
                raise

    async def head(self, key: str) -> ObjectInfo | None:
        """As `ObjectStore`."""
        async with self._bucket.request("look up", key):
            try:
                return object_info(key, await self._bucket.client.head_object(**self._bucket.object(key)))
            except ClientError as error:
                if error_code(error) not in _UNEXPLAINED:
                    raise
        # HEAD is answered without a body, so it was not said what is missing, the key or the bucket, or what is wrong.
        answer = await get_object(self._bucket, key, Range="bytes=0-0")
        if answer is None:
            return None
        answer["Body"].close()
        raise RepositoryUnavailable(f"object {self._bucket.root}{key} appeared while it was looked up")

    async def get(self, key: str) -> StoredObject | None:
        """As `ObjectStore`."""
        answer = await get_object(self._bucket, key)
        if answer is None:
            return None
        info = object_info(key, answer)
        try:
            async with self._bucket.request("read", key, info.size):
                body = await answer["Body"].read()
        finally:
            answer["Body"].close()
        demand_size(key, len(body), info.size)
        return StoredObject(info, body)

    @asynccontextmanager
    async def open(self, key: str) -> AsyncIterator[OpenObject | None]:
        """As `ObjectStore`. When the connection breaks, reading goes on where it stopped, over another one."""
        answer = await get_object(self._bucket, key)
        if answer is None:
            yield None
            return
        reader = ObjectReader(self._bucket, key, answer, self._retry)
        try:
            yield OpenObject(object_info(key, answer), reader.pieces())
        finally:
            reader.close()

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        """As `ObjectStore`."""
        async for info in self._listed(prefix, {"StartAfter": self._bucket.root + after} if after else {}):
            yield info

    async def list_folder(self, folder: str) -> AsyncIterator[ObjectInfo]:
        """As `ObjectStore`."""
        async for info in self._listed(folder, {"Delimiter": "/"}):
            yield info

    async def delete(self, keys: Sequence[str]) -> None:
        """As `ObjectStore`. One by one where the store does not remove many at once."""
        (await self._remover.remove(keys)).raise_first()

    async def delete_many(self, keys: Sequence[str]) -> Deletion:
        """As `ObjectStore`."""
        return await self._remover.remove(keys)

    async def deleted_versions(self, prefix: str) -> Mapping[str, DeletedVersion]:
        """As `ObjectStore`. Needs s3:ListBucketVersions, without which nothing is told, and s3:GetObjectVersion."""
        if not self._tells_versions:
            return {}
        try:
            async with self._bucket.request("list versions of", prefix):
                answer = await self._bucket.client.list_object_versions(
                    **self._bucket.bucket(), Prefix=self._bucket.root + prefix
                )
        except RepositoryRefused as error:
            cause = error.__cause__
            if not isinstance(cause, ClientError) or error_code(cause) in {"NoSuchBucket", *ABOUT_CREDENTIALS}:
                raise
            log.info("deleted objects are not told from absent ones", reason=error.one_line())
            self._tells_versions = False
            return {}
        deleted = {marker["Key"] for marker in answer.get("DeleteMarkers", ()) if marker.get("IsLatest")}
        kept = sorted(answer.get("Versions", ()), key=lambda version: version["LastModified"])
        newest = {version["Key"]: version["VersionId"] for version in kept if version["Key"] in deleted}
        return {
            (key := full_key.removeprefix(self._bucket.root)): DeletedVersion(
                version, await self._metadata_of(key, version)
            )
            for full_key, version in newest.items()
        }

    async def _metadata_of(self, key: str, version: str) -> Mapping[str, str]:
        try:
            async with self._bucket.request("look up a version of", key):
                answer = await self._bucket.client.head_object(**self._bucket.object(key), VersionId=version)
        except RepositoryRefused as error:
            log.info("metadata of a deleted object was not read", key=key, reason=error.one_line())
            return {}
        return object_info(key, answer).metadata

    async def check(self) -> None:
        """As `ObjectStore`."""
        await self._page("", {"MaxKeys": 1})

    async def time(self) -> datetime:
        """As `ObjectStore`."""
        return answered_at(await self._page("", {"MaxKeys": 1}))

    async def _probed(self) -> _Features:
        """Return what the store understands, found out with an object of our own, once in a process."""
        async with self._probing:
            if self._features is None:
                self._features = await self._probe(probe_key())
                if not self._features.conditional_put:
                    log.warning("store without conditional writes found", endpoint=self._bucket.endpoint)
            return self._features

    async def _probe(self, key: str) -> _Features:
        features = _Features(crc32c=True, conditional_put=True)
        try:
            await self._put(key, b"probe", features)
        except RepositoryRefused as error:
            if not _is_not_understood(error):
                raise
            features = _Features(crc32c=False, conditional_put=True)
            await self._put(key, b"probe", features)
        try:
            replaced = await self._put(key, b"probe", features, if_absent=True)
        except RepositoryRefused as error:
            if not _is_not_understood(error):
                raise
            replaced = True
        finally:
            with suppress(RepositoryError):  # credentials that may write but not delete are good credentials
                await self.delete([key])
        return _Features(crc32c=features.crc32c, conditional_put=not replaced)

    async def is_conditional(self) -> bool:
        """Tell whether the store refuses to replace an object that is to be absent, stored whole or in parts.

        Found out once in a process.
        """
        features = await self._retry(self._probed)
        async with self._probing:
            if self._conditional_completion is None:
                self._conditional_completion = features.conditional_put and await self._probe_completion(features)
            return self._conditional_completion

    @property
    def bucket(self) -> S3Bucket:
        """Where the objects are, for what only S3 has."""
        return self._bucket

    async def _probe_completion(self, features: _Features) -> bool:
        key = probe_key()
        upload = MultipartUpload(self._bucket, key, self._retry, crc32c=features.crc32c)
        await self._retry(partial(self._put, key, b"probe", features))
        try:
            return await upload.send(gather_parts(key, _once(b"another")), {}, if_absent=True) is None
        except RepositoryRefused as error:
            if not _is_not_understood(error):
                raise
            return False
        finally:
            with suppress(RepositoryError):
                await self.delete([key])

    async def _put(
        self,
        key: str,
        body: bytes,
        features: _Features,
        metadata: Mapping[str, str] | None = None,
        *,
        if_absent: bool = False,
    ) -> bool:
        """Store `body`; with `if_absent`, return False if the store says that `key` exists."""
        options: dict[str, Any] = {**self._bucket.write_options, "Metadata": dict(metadata or {})}
        options |= crc32c_header(await crc32c_of(body)) if features.crc32c else await md5_header(body)
        if if_absent:
            options["IfNoneMatch"] = "*"
        async with self._bucket.request("store", key, len(body)):
            try:
                await self._bucket.client.put_object(**self._bucket.object(key), Body=body, **options)
            except ClientError as error:
                if if_absent and error_code(error) in EXISTS:
                    return False
                raise
        return True

    async def _listed(self, prefix: str, options: dict[str, Any]) -> AsyncIterator[ObjectInfo]:
        while True:
            page = await self._retry(partial(self._page, prefix, options))
            for entry in page.get("Contents", ()):
                key = entry["Key"][len(self._bucket.root) :]
                if not key.endswith("/"):  # what consoles create to show an empty folder
                    yield ObjectInfo(key, entry["Size"], entry["LastModified"].astimezone(UTC))
            if not page.get("IsTruncated"):
                return
            # What is missing would be taken for absent; a list that goes on where it has been has no end.
            if (token := page.get("NextContinuationToken")) in (None, "", options.get("ContinuationToken")):
                raise RepositoryUnavailable(f"{self._bucket.endpoint} does not say how its list of {prefix} goes on")
            options = {**options, "ContinuationToken": token}

    async def _page(self, prefix: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
        async with self._bucket.request("list", prefix):
            return await self._bucket.client.list_objects_v2(
                **self._bucket.bucket(), Prefix=self._bucket.root + prefix, **options
            )


def _is_not_understood(error: RepositoryRefused) -> bool:
    """Tell whether the store lacks an ability. Any other refusal says nothing of it; the next write probes again."""
    return isinstance(error.__cause__, ClientError) and error_code(error.__cause__) in _NOT_UNDERSTOOD


def probe_key() -> str:
    """Return the key of an object by which it is found out what the store can do."""
    return f"pitr_probe_{secrets.token_hex(8)}"


async def _once(chunk: bytes) -> AsyncIterator[bytes]:
    yield chunk


async def _chained(gathered: list[Part], parts: AsyncIterator[Part]) -> AsyncIterator[Part]:
    """Yield what was gathered, letting go of it, then the rest of `parts`."""
    while gathered:
        yield gathered.pop(0)
    async for part in parts:
        yield part
