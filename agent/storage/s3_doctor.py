"""What `pitr check` asks of S3 beside the operations of an `ObjectStore`: abilities, rules of the bucket, credentials.

One look that fails does not keep the others from being made. Probe objects are removed.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from botocore.exceptions import ClientError

from agent.domain.store_checks import BucketFacts, Credentials, LifecycleRule
from agent.errors import AgentError, RepositoryError
from agent.ports import Clock
from agent.settings import S3Settings
from agent.storage.retrying import Retry
from agent.storage.s3 import S3ObjectStore, probe_key
from agent.storage.s3_bucket import S3Bucket, TimeLimits
from agent.storage.s3_checksums import crc32c_header, crc32c_of
from agent.storage.s3_errors import error_code
from agent.storage.s3_reading import get_object
from agent.tasks import task_group

_BODY = b"what pitr check stores to look at"
_RANGE = slice(5, 9)
# Storage classes whose objects have to be restored before they can be read.
_COLD = frozenset({"GLACIER", "DEEP_ARCHIVE"})


async def examine_bucket(settings: S3Settings, clock: Clock, limits: TimeLimits) -> BucketFacts:
    """Return what is seen of the bucket; each request is made once.

    Raises:
        RepositoryRefused: The endpoint is unusable, or there are no credentials.
    """
    store = await S3ObjectStore.connect(settings, Retry(clock, 0), limits)
    try:
        return await _Doctor(store, settings).examine()
    finally:
        await store.close()


class _Doctor:
    def __init__(self, store: S3ObjectStore, settings: S3Settings) -> None:
        self._store = store
        self._bucket: S3Bucket = store.bucket
        self._settings = settings
        self._found: dict[str, Any] = {}

    async def examine(self) -> BucketFacts:
        looks: Mapping[str, Callable[[], Awaitable[object]]] = {
            "reads_ranges": self._reads_ranges,
            "compares_checksums": self._compares_checksums,
            "is_conditional": self._store.is_conditional,
            "versioning": self._versioning,
            "lock": self._lock,
            "lifecycle": self._lifecycle,
            "credentials": self._credentials,
        }
        async with task_group() as group:
            for name, look in looks.items():
                group.create_task(self._look(name, look), name=f"look at {name}")
        return BucketFacts(prefix=self._bucket.root, **self._found)

    async def _look(self, name: str, look: Callable[[], Awaitable[object]]) -> None:
        try:
            self._found[name] = await look()
        except AgentError as error:
            self._found[name] = error

    async def _reads_ranges(self) -> bool:
        key = probe_key()
        await self._store.put(key, _BODY)
        try:
            answer = await get_object(self._bucket, key, Range=f"bytes={_RANGE.start}-{_RANGE.stop - 1}")
            if answer is None:
                return False
            async with self._bucket.request("read", key):
                return bool(await answer["Body"].read() == _BODY[_RANGE])
        finally:
            await self._remove(key)

    async def _compares_checksums(self) -> bool:
        key = probe_key()
        wrong = crc32c_header(await crc32c_of(_BODY) ^ 1)
        async with self._bucket.request("store", key):
            try:
                await self._bucket.client.put_object(
                    **self._bucket.object(key), Body=_BODY, **wrong, **self._bucket.write_options
                )
            except ClientError as error:
                if error_code(error) in ("BadDigest", "InvalidRequest", "XAmzContentChecksumMismatch"):
                    return True
                raise
        await self._remove(key)
        return False

    async def _remove(self, key: str) -> None:
        with suppress(RepositoryError):  # told by the trial of DELETE
            await self._store.delete([key])

    async def _versioning(self) -> str:
        async with self._bucket.request("ask for the versioning of", ""):
            answer = await self._bucket.client.get_bucket_versioning(**self._bucket.bucket())
        return str(answer.get("Status", "Off"))

    async def _lock(self) -> str | None:
        async with self._bucket.request("ask for the object lock of", ""):
            try:
                answer: Mapping[str, Any] = await self._bucket.client.get_object_lock_configuration(
                    **self._bucket.bucket()
                )
            except ClientError as error:
                if error_code(error) in ("ObjectLockConfigurationNotFoundError", "NoSuchObjectLockConfiguration"):
                    return None
                raise
        return _retention(answer.get("ObjectLockConfiguration", {}).get("Rule", {}).get("DefaultRetention", {}))

    async def _lifecycle(self) -> Sequence[LifecycleRule]:
        async with self._bucket.request("ask for the lifecycle of", ""):
            try:
                answer: Mapping[str, Any] = await self._bucket.client.get_bucket_lifecycle_configuration(
                    **self._bucket.bucket()
                )
            except ClientError as error:
                if error_code(error) == "NoSuchLifecycleConfiguration":
                    return ()
                raise
        return tuple(rule for each in answer.get("Rules", ()) if (rule := lifecycle_rule(each)) is not None)

    async def _credentials(self) -> Credentials:
        settings = self._settings
        if settings.access_key_id is not None:
            return Credentials("AWS_ACCESS_KEY_ID", None, are_renewed=settings.session_token is None)
        source = await self._bucket.credentials_source()
        return Credentials(source, self._bucket.credentials_expire_at(), are_renewed=True)


def _retention(default: Mapping[str, Any]) -> str | None:
    """Write a default retention in words: `GOVERNANCE, 30 days`; None if there is none."""
    if "Days" in default or "Years" in default:
        time = f"{default['Days']} days" if "Days" in default else f"{default['Years']} years"
        return f"{default.get('Mode', 'default')}, {time}"
    return None


def lifecycle_rule(rule: Mapping[str, Any]) -> LifecycleRule | None:
    """Read a rule as S3 answers it; None if it is switched off, or for objects with tags: ours have none."""
    chosen = rule.get("Filter") or {}
    both = chosen.get("And") or {}
    if rule.get("Status") != "Enabled" or "Tag" in chosen or both.get("Tags"):
        return None
    expiration = rule.get("Expiration") or {}
    moves = [each for each in rule.get("Transitions") or () if each.get("StorageClass") in _COLD]
    acts = [expiration] if "Days" in expiration or "Date" in expiration else moves
    return LifecycleRule(
        name=str(rule.get("ID", "")),
        prefix=str(both.get("Prefix") or chosen.get("Prefix") or rule.get("Prefix") or ""),
        removes="Days" in expiration or "Date" in expiration,
        archives=bool(moves),
        removes_versions="NoncurrentVersionExpiration" in rule,
        when=_when(acts[0]) if acts else "",
    )


def _when(act: Mapping[str, Any]) -> str:
    if "Days" in act:
        return f"after {act['Days']} days"
    date = act.get("Date")
    return f"on {date.astimezone(UTC):%Y-%m-%d}" if isinstance(date, datetime) else "at a date"
