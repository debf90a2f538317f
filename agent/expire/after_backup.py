"""Expires by PITR_RETENTION whenever a base backup was taken, and never without one: a backup that fails takes none
with it."""

import asyncio
from datetime import datetime

import structlog

from agent.domain.retention import RetentionPolicy
from agent.errors import AgentError
from agent.expire.expiry import Expiry
from agent.ports import Clock
from agent.tasks import first_of
from agent.telemetry.status import ExpiryStatus, Failure

RETRY_SECONDS = 3600.0

log = structlog.get_logger()


class ExpiryAfterBackup:
    """Run it as a service, and call `ask` after a backup. Without a policy it keeps everything."""

    name = "expiry"

    def __init__(self, expiry: Expiry, policy: RetentionPolicy | None, clock: Clock) -> None:
        self._expiry = expiry
        self._policy = policy
        self._clock = clock
        self._asked = asyncio.Event()
        self._succeeded_at: datetime | None = None
        self._failure: Failure | None = None

    def status(self) -> ExpiryStatus:
        """Say what is kept, and how the last expiry went."""
        policy = self._policy
        window = policy.window if policy is not None else None
        return ExpiryStatus(
            retention=None if policy is None else str(policy),
            window_seconds=None if window is None else window.total_seconds(),
            succeeded_at=self._succeeded_at,
            failure=self._failure,
        )

    def ask(self) -> None:
        """Expire soon. Returns at once; what comes of it is in the log and the metrics."""
        self._asked.set()

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            if self._policy is not None and not await self._expire(self._policy):
                await first_of(self._clock.sleep(RETRY_SECONDS), self._asked.wait())
                self._asked.set()

    async def _expire(self, policy: RetentionPolicy) -> bool:
        try:
            _, removal = await self._expiry.expire(policy)
        except AgentError as error:
            log.error("expiry failed", reason=error.one_line())  # noqa: TRY400 - no traceback for operators
            self._failure = Failure(self._clock.now(), error.one_line())
            return False
        now = self._clock.now()
        if removal.failed:
            key, kept = next(iter(removal.failed.items()))
            reason = f"{len(removal.failed)} objects could not be removed, such as {key}: {kept.one_line()}"
            self._failure = Failure(now, reason)
        else:
            self._succeeded_at, self._failure = now, None
        return not removal.failed
