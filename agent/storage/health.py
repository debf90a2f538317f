"""Whether the repository's store answers, as the requests to it show. Nothing is asked for this alone."""

from collections.abc import Callable
from datetime import datetime

from agent.ports import Clock
from agent.telemetry.status import StoreStatus


class StoreHealth:
    """Remembers the last answer, and since when there is none.

    answered_at: of the last request that was answered, also with "there is no such object".
    failing_since: of the first that was not, or was refused, since then; `reason` is of the last one.
    credentials_expire_at: tells when the credentials in use expire, None if they do not or it is not known.
    """

    def __init__(self, clock: Clock) -> None:
        self.answered_at: datetime | None = None
        self.failing_since: datetime | None = None
        self.reason = ""
        self.credentials_expire_at: Callable[[], datetime | None] = lambda: None
        self._clock = clock

    def answered(self) -> None:
        """Take note of an answer."""
        self.answered_at, self.failing_since, self.reason = self._clock.now(), None, ""

    def failed(self, reason: str) -> None:
        """Take note of a request that was not answered, or refused."""
        self.failing_since = self.failing_since or self._clock.now()
        self.reason = reason

    def status(self, foreign: str | None) -> StoreStatus:
        """Say how it is; `foreign` as in `StoreStatus`."""
        return StoreStatus(self.answered_at, self.failing_since, self.reason, self.credentials_expire_at(), foreign)
