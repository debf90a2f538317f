"""Times, durations and sizes for people."""

from datetime import datetime


def time_text(moment: datetime) -> str:
    """Write a time in UTC: `2026-11-23 02:00:04 UTC`."""
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def age_text(moment: datetime, now: datetime) -> str:
    """Write a time by its distance: `4 min 05 s ago`, `in 2 h 07 min`."""
    seconds = (now - moment).total_seconds()
    return f"{seconds_text(seconds)} ago" if seconds >= 0 else f"in {seconds_text(-seconds)}"


def seconds_text(seconds: float) -> str:
    """Write a duration: `3.2 s`, `4 min 05 s`, `2 h 07 min`, `3 d 4 h`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours = minutes // 60
    return f"{hours} h {minutes % 60:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def size_text(size: float) -> str:
    """Write a size: `4.3 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
