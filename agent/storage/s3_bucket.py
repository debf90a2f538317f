"""One bucket and the process's one client to it: names, time limits, errors."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from botocore.handlers import convert_body_to_file_like_object

from agent.errors import RepositoryRefused, RepositoryUnavailable
from agent.settings import S3Settings
from agent.storage.s3_credentials import FoundCredentials, session_with
from agent.storage.s3_errors import S3_ERRORS, SET_UP_ERRORS, Request, translate
from agent.storage.s3_http import S3HttpSession
from agent.storage.s3_shortcuts import USER_AGENT, find_endpoint_once, parse_times_fast

if TYPE_CHECKING:
    from types_aiobotocore_s3.client import S3Client

_SLOWEST_BYTES_PER_SECOND = 128 << 10


@dataclass(frozen=True, slots=True)
class TimeLimits:
    """Seconds after which one request is given up.

    connect: Without a connection.
    silence: Without a byte of the answer, once the request is sent.
    request: In all, and a second more for each 128 KiB of body.
    abandoned: An upload in parts that was begun so long ago and is not complete is nobody's any more.
    """

    connect: float = 10
    silence: float = 60
    request: float = 90
    abandoned: float = 48 * 3600


class S3Bucket:
    """A prefix in a bucket, reached through one client. `client` is botocore's; `root` ends with a slash or is empty.

    write_options: What every write has to say: storage class and server-side encryption.
    """

    def __init__(
        self,
        client: "S3Client",
        credentials: FoundCredentials | None,
        settings: S3Settings,
        limits: TimeLimits,
        resources: AsyncExitStack,
    ) -> None:
        """Use `connect`. `credentials` are None where the settings name them."""
        self.client = client
        self._credentials = credentials
        self.root = f"{settings.prefix}/" if settings.prefix else ""
        self.endpoint = str(client.meta.endpoint_url)
        self.write_options = _write_options(settings)
        self._name = settings.bucket
        self.limits = limits
        self._resources = resources

    @classmethod
    async def connect(cls, settings: S3Settings, limits: TimeLimits) -> "S3Bucket":
        """Make the client; nothing is sent to the bucket yet.

        Raises:
            RepositoryRefused: The endpoint is unusable, or there are no credentials.
        """
        request = Request("reach the repository", settings.bucket, settings.endpoint or "Amazon S3")
        try:
            async with AsyncExitStack() as stack:
                credentials = FoundCredentials() if settings.access_key_id is None else None
                session = session_with(credentials) if credentials else get_session()
                parse_times_fast(session)
                client = await stack.enter_async_context(
                    session.create_client("s3", **_client_options(settings, limits))
                )
                find_endpoint_once(client)
                for operation in ("PutObject", "UploadPart"):
                    # It turns bytes into a file: a copy, and "Expect: 100-continue", a round trip more.
                    event = f"before-parameter-build.s3.{operation}"
                    client.meta.events.unregister(event, convert_body_to_file_like_object)
                if credentials is not None and await session.get_credentials() is None:
                    raise RepositoryRefused(
                        "no credentials for the repository were found",
                        hint="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the pod a workload identity.",
                    )
                bucket = cls(client, credentials, settings, limits, stack.pop_all())
        except SET_UP_ERRORS as error:
            raise translate(error, request) from error
        return bucket

    def credentials_expire_at(self) -> datetime | None:
        """Return when the credentials expire; None if they do not, as far as is known."""
        return None if self._credentials is None else self._credentials.expire_at

    async def close(self) -> None:
        """Close every connection."""
        await self._resources.aclose()

    async def credentials_source(self) -> str:
        """Return where the credentials were found that the settings do not name; they are dated then.

        Raises:
            RepositoryError: They could not be got.
        """
        assert self._credentials is not None, "the settings name the credentials"
        async with self.request("get credentials for", ""):
            await self._credentials.get_frozen_credentials()
        return self._credentials.source

    def bucket(self) -> dict[str, Any]:
        """Return the arguments that name the bucket in a request."""
        return {"Bucket": self._name}

    def object(self, key: str) -> dict[str, Any]:
        """Return the arguments that name the object `key` in a request."""
        return {"Bucket": self._name, "Key": self.root + key}

    def describe(self, verb: str, key: str) -> Request:
        """Return what messages call a request about `key`."""
        return Request(f"{verb} {self.root}{key}", self._name, self.endpoint)

    @asynccontextmanager
    async def request(self, verb: str, key: str, size: int = 0) -> AsyncIterator[None]:
        """Bound a request about `key` in time, by the `size` of its body in bytes, and translate what it raises.

        A refusal of credentials in whose place others are found is `RepositoryUnavailable`: worth another attempt.
        """
        generation = self._credentials.generation if self._credentials is not None else 0
        try:
            async with asyncio.timeout(self.limits.request + size / _SLOWEST_BYTES_PER_SECOND):
                yield
        except S3_ERRORS as error:
            problem = translate(error, self.describe(verb, key))
            if self._credentials is not None and await self._credentials.replaced(error, generation):
                raise RepositoryUnavailable(problem.message, hint="Other credentials were found.") from error
            raise problem from error


def _client_options(settings: S3Settings, limits: TimeLimits) -> dict[str, Any]:
    secret, token = settings.secret_access_key, settings.session_token
    return {
        "region_name": settings.region,
        "endpoint_url": settings.endpoint,
        "aws_access_key_id": settings.access_key_id,
        "aws_secret_access_key": secret.reveal() if secret else None,
        "aws_session_token": token.reveal() if token else None,
        "verify": str(settings.ca_file) if settings.ca_file else None,
        "config": AioConfig(
            http_session_cls=S3HttpSession,
            connect_timeout=limits.connect,
            read_timeout=limits.silence,
            user_agent=USER_AGENT,
            retries={"total_max_attempts": 1, "mode": "standard"},  # ours are in retrying.py
            # Their default wraps bodies in chunks with trailers, which some stores keep as content.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            parameter_validation=False,  # types say it, and it would refuse what it cannot describe
            s3={
                "addressing_style": "path" if settings.force_path_style else "virtual",
                "payload_signing_enabled": False,  # a checksum goes with every body instead
            },
        ),
    }


def _write_options(settings: S3Settings) -> dict[str, Any]:
    options = {
        "StorageClass": settings.storage_class,
        "ServerSideEncryption": settings.sse,
        "SSEKMSKeyId": settings.sse_kms_key_id,
    }
    return {name: value for name, value in options.items() if value}
