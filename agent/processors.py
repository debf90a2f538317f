"""How many processors this process may use: fewer than the machine has, in a container."""

import math
import os
from pathlib import Path


def processors(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how many processors this process can keep busy, at least 1: a limit of 1.5 counts as 2.

    More threads than that would spend the container's share in the first milliseconds of each period, and the event
    loop would wait with them for the next. Sources: sched_getaffinity(2); Linux, "Control Group v2", cpu.max, and "CFS
    Bandwidth Control" for version 1.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = map(int, " ".join((cgroup / name).read_text() for name in names).split())
        except (OSError, ValueError):  # absent, or "max": no limit
            continue
        if quota > 0 and period > 0:  # version 1 says -1 for no limit
            usable = min(usable, math.ceil(quota / period))
    return usable
