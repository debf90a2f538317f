"""Verifies the repository after each base backup, and daily: what somebody removed is told before it is needed.

From listings, as `pitr verify` without --deep. What is wrong is told when it is seen twice: an expiry or an upload may
have been under way.
"""

import asyncio

import structlog

from agent.errors import AgentError
from agent.ports import Clock, ObjectStore
from agent.repository.wal_archive import WalArchive
from agent.tasks import first_of
from agent.telemetry.status import Failure, VerificationStatus
from agent.verify.verifier import Verification, verify_repository

VERIFY_SECONDS = 86400.0
CONFIRM_SECONDS = 60.0  # until a second look
RETRY_SECONDS = 3600.0  # after one that could not be made
_TOLD = 20  # problems that are kept; the first ones say enough

log = structlog.get_logger()


class VerifyWatch:
    """Run it as a service, and call `ask` after a base backup."""

    name = "verification"

    def __init__(self, store: ObjectStore, archive: WalArchive, clock: Clock) -> None:
        self._store = store
        self._archive = archive
        self._clock = clock
        self._asked = asyncio.Event()
        self._status = VerificationStatus(None, (), 0, (), None)

    def ask(self) -> None:
        """Verify soon. Returns at once."""
        self._asked.set()

    def status(self) -> VerificationStatus:
        """Say what was found last."""
        return self._status

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            pause = VERIFY_SECONDS if await self.verify() else RETRY_SECONDS
            await first_of(self._clock.sleep(pause), self._asked.wait())
            self._asked.clear()

    async def verify(self) -> bool:
        """Look at the repository; tell whether that could be done."""
        try:
            found = await verify_repository(self._store, self._archive, self._clock)
            if not found.is_ok:
                found = await self._confirmed(found)
        except AgentError as error:
            log.warning("repository could not be verified", reason=error.one_line())
            failure = Failure(self._clock.now(), error.one_line())
            before = self._status
            self._status = VerificationStatus(before.at, before.whole, before.problems, before.first_problems, failure)
            return False
        problems = tuple(found.problems)
        if problems:
            log.error("repository is not whole", problems=len(problems), first_problems=problems[:_TOLD])
        whole = tuple(each.name for each in found.backups if not each.problems)
        self._status = VerificationStatus(self._clock.now(), whole, len(problems), problems[:_TOLD], None)
        return True

    async def _confirmed(self, before: Verification) -> Verification:
        """Look until it is whole, or something is found a second time; return that."""
        while True:
            log.info("repository not whole at a first look", first_problems=before.problems[:_TOLD])
            await self._clock.sleep(CONFIRM_SECONDS)
            again = await verify_repository(self._store, self._archive, self._clock)
            if again.is_ok or set(again.problems) & set(before.problems):
                return again
            before = again
