"""Credentials that are looked for again when the store refuses those that were found.

botocore renews what it knows to expire. It does not notice that a mounted file was replaced, nor that a session was
ended before its time: without this, only a restart would help.
"""

import asyncio
import time
from datetime import datetime

import structlog
from aiobotocore.credentials import AioCredentials
from aiobotocore.session import AioSession, get_session
from botocore.credentials import ReadOnlyCredentials
from botocore.exceptions import ClientError, NoCredentialsError

from agent.storage.s3_errors import ABOUT_CREDENTIALS, S3_ERRORS, error_code

_SHORTEST_PAUSE_SECONDS = 1.0  # between two searches: many requests may be refused at once
_LONGEST_SEARCH_SECONDS = 30.0

log = structlog.get_logger()


class FoundCredentials(AioCredentials):  # type: ignore[misc] # aiobotocore has no types
    """The credentials of botocore's chain: environment, files, web identity, instance.

    generation: how often others were found.
    """

    def __init__(self) -> None:
        super().__init__("", "", method="chain")
        self.generation = 0
        self._found: AioCredentials | None = None
        self._searching = asyncio.Lock()
        self._searched_at = float("-inf")

    @property
    def expire_at(self) -> datetime | None:
        """When they expire unless botocore renews them, which it does a quarter of an hour before; None: never."""
        expiry: datetime | None = getattr(self._found, "_expiry_time", None)  # of its refreshable credentials
        return expiry

    @property
    def source(self) -> str:
        """Where they are from, as botocore calls it: `assume-role-with-web-identity`, `shared-credentials-file`, ..."""
        return str(self.method if self._found is None else self._found.method)

    async def load_credentials(self) -> "FoundCredentials | None":
        """Return these credentials, or None if the chain finds none. A session's `credential_provider`."""
        self._found = await get_session().get_credentials()
        return self if self._found is not None else None

    async def get_frozen_credentials(self) -> ReadOnlyCredentials:
        """Return what a request is signed with. As of `AioCredentials`."""
        if self._found is None:
            raise NoCredentialsError
        return await self._found.get_frozen_credentials()

    async def replaced(self, error: Exception, generation: int) -> bool:
        """Tell whether there are others now than those of `generation`, with which a request failed.

        Looks for them if the error is about credentials; a search that fails finds none.
        """
        if not isinstance(error, ClientError) or error_code(error) not in ABOUT_CREDENTIALS:
            return False
        async with self._searching:
            if generation == self.generation and time.monotonic() - self._searched_at >= _SHORTEST_PAUSE_SECONDS:
                await self._search()
                self._searched_at = time.monotonic()
        return generation != self.generation

    async def _search(self) -> None:
        try:
            async with asyncio.timeout(_LONGEST_SEARCH_SECONDS):
                found = await get_session().get_credentials()
                if found is None or await found.get_frozen_credentials() == await self.get_frozen_credentials():
                    return
        except S3_ERRORS as error:
            log.warning("credentials not found again", reason=" ".join(str(error).split()))
            return
        self._found = found
        self.generation += 1
        log.info("credentials renewed", method=found.method)


def session_with(credentials: FoundCredentials) -> AioSession:
    """Return a session whose clients sign with `credentials`."""
    session = get_session()
    session.register_component("credential_provider", credentials)
    return session
