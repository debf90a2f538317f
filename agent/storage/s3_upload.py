"""A stream of unknown length into one S3 object: parts of equal size, one on its way while the next is gathered.

Invariants: the object appears when every part is acknowledged and completion confirmed; what fails, is cancelled or is
not wanted, because the object exists, is aborted; no more than two parts and one chunk are in memory.
"""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import google_crc32c
import structlog
from botocore.exceptions import ClientError

from agent.errors import RepositoryError, RepositoryRefused
from agent.ports import Body
from agent.storage.retrying import Retry
from agent.storage.s3_bucket import S3Bucket
from agent.storage.s3_checksums import crc32c_header, md5_header
from agent.storage.s3_errors import EXISTS, error_code
from agent.storage.s3_reading import answered_at

if TYPE_CHECKING:
    from types_aiobotocore_s3.type_defs import CompletedPartTypeDef

PART_BYTES = 16 << 20
"""Size of every part but the last. S3 wants at least 5 MiB; two parts are in memory at once."""

MOST_PARTS = 10_000
"""So many parts S3 takes: 156 GiB an object. Source: Amazon S3 User Guide, "Amazon S3 multipart upload limits"."""

_ABORT_SECONDS = 10

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive bytes of a stream, `PART_BYTES` unless they are the last, and their CRC32C. Numbers begin at 1."""

    number: int
    body: bytearray
    crc32c: int


async def gather_parts(key: str, chunks: AsyncIterator[Body], *, most: int = MOST_PARTS) -> AsyncGenerator[Part, None]:
    """Yield the concatenated `chunks` of `key` as parts; only the last one is shorter than `PART_BYTES`, perhaps empty.

    Raises:
        RepositoryRefused: They are more than `most` parts hold.
    """
    number, body, crc32c = 1, bytearray(), 0
    async for chunk in chunks:
        rest = memoryview(chunk)
        while len(rest):
            piece = bytes(rest[: PART_BYTES - len(body)])
            rest = rest[len(piece) :]
            body += piece
            crc32c = google_crc32c.extend(crc32c, piece)
            if len(body) == PART_BYTES:
                if number == most:
                    raise RepositoryRefused(
                        f"{key} would be larger than {most * PART_BYTES >> 30} GiB, which S3 does not take",
                        hint="No file of a relation is that large: move the one that is out of the data directory.",
                    )
                yield Part(number, body, crc32c)
                number, body, crc32c = number + 1, bytearray(), 0
    yield Part(number, body, crc32c)


class MultipartUpload:
    """One upload of one object; each request is repeated by `retry`."""

    def __init__(self, bucket: S3Bucket, key: str, retry: Retry, *, crc32c: bool) -> None:
        """`crc32c`: state CRC32C checksums, else MD5."""
        self._bucket = bucket
        self._key = key
        self._retry = retry
        self._crc32c = crc32c
        self._upload: dict[str, Any] = bucket.object(key)

    async def send(
        self, parts: AsyncIterator[Part], metadata: Mapping[str, str], *, if_absent: bool = False
    ) -> int | None:
        """Store all `parts` as the object; return its size in bytes. If it fails, nothing is left over.

        With `if_absent`, return None if the store says that the object exists. Whether it says so is to be known.
        """
        self._upload["UploadId"] = await self._retry(partial(self._begin, metadata))
        try:
            size, done = await self._send_parts(parts)
            completed = await self._retry(partial(self._complete, done, if_absent=if_absent))
        except BaseException:
            await asyncio.shield(self._abort())
            raise
        if not completed:
            await asyncio.shield(self._abort())
        return size if completed else None

    async def _begin(self, metadata: Mapping[str, str]) -> str:
        options: dict[str, Any] = {**self._bucket.write_options, "Metadata": dict(metadata)}
        if self._crc32c:
            options["ChecksumAlgorithm"] = "CRC32C"
        async with self._bucket.request("begin to store", self._key):
            answer = await self._bucket.client.create_multipart_upload(**self._upload, **options)
            return answer["UploadId"]

    async def _send_parts(self, parts: AsyncIterator[Part]) -> tuple[int, list["CompletedPartTypeDef"]]:
        """Return the size of all parts, and their description for completion."""
        size = 0
        done: list[CompletedPartTypeDef] = []
        sending: asyncio.Task[CompletedPartTypeDef] | None = None
        try:
            async with asyncio.TaskGroup() as group:
                async for part in parts:
                    if sending is not None:
                        done.append(await sending)
                    size += len(part.body)
                    sending = group.create_task(
                        self._retry(partial(self._send_part, part)), name=f"send part {part.number} of {self._key}"
                    )
                if sending is not None:
                    done.append(await sending)
        except BaseExceptionGroup as failures:
            error = failures.exceptions[0]  # what ended the one task, or the stream
            raise error from error.__cause__
        return size, done

    async def _send_part(self, part: Part) -> "CompletedPartTypeDef":
        checksum = crc32c_header(part.crc32c) if self._crc32c else await md5_header(part.body)
        async with self._bucket.request("store a part of", self._key, len(part.body)):
            answer = await self._bucket.client.upload_part(
                **self._upload, PartNumber=part.number, Body=part.body, **checksum
            )
            done: CompletedPartTypeDef = {"PartNumber": part.number, "ETag": answer["ETag"]}
            if self._crc32c:
                done["ChecksumCRC32C"] = checksum["ChecksumCRC32C"]
            return done

    async def _complete(self, done: list["CompletedPartTypeDef"], *, if_absent: bool) -> bool:
        """Make the object of its parts; with `if_absent`, return False if there is one already: perhaps this one."""
        options: dict[str, Any] = {"IfNoneMatch": "*"} if if_absent else {}
        async with self._bucket.request("complete", self._key):
            try:
                await self._bucket.client.complete_multipart_upload(
                    **self._upload, MultipartUpload={"Parts": done}, **options
                )
            except ClientError as error:
                if if_absent and error_code(error) in EXISTS:
                    return False
                # Not every store knows an upload again that an earlier attempt completed, its answer lost.
                if error_code(error) != "NoSuchUpload" or not await self._is_complete(done):
                    raise
        return True

    async def _is_complete(self, done: list["CompletedPartTypeDef"]) -> bool:
        """Tell whether the object is made of these very parts."""
        stored = await self._bucket.client.head_object(**self._bucket.object(self._key))
        return stored["ETag"].strip('"') == _etag_of_parts([part["ETag"].strip('"') for part in done])

    async def _abort(self) -> None:
        try:
            async with asyncio.timeout(_ABORT_SECONDS), self._bucket.request("abort the upload of", self._key):
                with suppress(self._bucket.client.exceptions.NoSuchUpload):  # it was completed, the answer lost
                    await self._bucket.client.abort_multipart_upload(**self._upload)
        except (RepositoryError, TimeoutError) as error:
            log.warning(
                "multipart upload left behind", key=self._key, upload=self._upload["UploadId"], error=str(error)
            )


async def abort_abandoned(bucket: S3Bucket) -> None:
    """Give up what killed processes began to upload below our prefix; it is in no listing, and costs like objects.

    How old an upload is tells the store's clock. Without a prefix other uploads of the bucket cannot be told from ours,
    and stay. What fails is logged.
    """
    if not bucket.root:
        return
    markers: dict[str, Any] = {}
    looked: list[dict[str, Any]] = []
    try:
        while markers not in looked:  # a list may go on where it has been
            looked.append(markers)
            async with bucket.request("list unfinished uploads of", ""):
                page: dict[str, Any] = dict(
                    await bucket.client.list_multipart_uploads(**bucket.bucket(), Prefix=bucket.root, **markers)
                )
            before = answered_at(page) - timedelta(seconds=bucket.limits.abandoned)
            for upload in page.get("Uploads", ()):
                if upload.get("Initiated", before) < before:
                    await _abort_abandoned(bucket, upload)
            markers = {name: page[f"Next{name}"] for name in ("KeyMarker", "UploadIdMarker") if f"Next{name}" in page}
            if not page.get("IsTruncated") or not markers:
                return
    except RepositoryError as error:
        log.info("abandoned uploads were not removed", reason=error.one_line())


async def _abort_abandoned(bucket: S3Bucket, upload: Mapping[str, Any]) -> None:
    key = upload["Key"].removeprefix(bucket.root)
    async with bucket.request("abort the upload of", key):
        await bucket.client.abort_multipart_upload(**bucket.object(key), UploadId=upload["UploadId"])
    log.info("abandoned upload removed", key=key, begun_at=upload["Initiated"])


def _etag_of_parts(etags: list[str]) -> str:
    """Return the ETag that S3 gives to an object of these parts."""
    try:
        joined = b"".join(bytes.fromhex(etag) for etag in etags)
    except ValueError:
        return ""  # a store with other ETags
    return f"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(etags)}"
