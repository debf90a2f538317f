"""Saying a thing once: what goes on failing fails thousands of times an hour, and is read once."""

from collections.abc import Callable


class News:
    """Remembers for `seconds` what was said; `monotonic` is the clock."""

    def __init__(self, seconds: float, monotonic: Callable[[], float]) -> None:
        self._seconds = seconds
        self._monotonic = monotonic
        self._said: dict[str, float] = {}

    def is_news(self, what: str) -> bool:
        """Tell whether `what` is to be said now, and take it for said."""
        now = self._monotonic()
        self._said = {said: at for said, at in self._said.items() if now - at < self._seconds}
        is_news = what not in self._said
        self._said.setdefault(what, now)
        return is_news

    def forget(self) -> None:
        """Take nothing for said."""
        self._said.clear()
