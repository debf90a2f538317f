"""Which base backups and which WAL a retention policy keeps, and why.

The rules, in the order in which they speak:

    A window keeps what finished in it, and on every timeline that was written in it the newest intact base backup from
    before it: so every moment of the window can be restored. A count keeps as many full backups, with their deltas;
    those of a timeline that was left, as by a restore to the past, do not count against those that lead to the present.
    With both, what either keeps stays.
    Pinned base backups stay, and so does what a kept, running or being restored one builds on.
    One intact base backup that leads to the timeline written last stays, whatever the policy says.
    One that is known to be damaged, or has corrupt pages, replaces none that is better: in each of these places the
    newest better one stays, too, and with it its WAL.
    A kept base backup keeps all WAL after its start on every timeline that leads from it. One that is only pinned keeps
    the WAL that makes it consistent, as with WAL-G.

On one path of timelines of one database cluster the order of LSNs is the order in time. Elsewhere a base backup counts
as newer only if its own times and the store's agree: a copied bucket has new store times, a wrong clock wrong own ones,
and a name says nothing after a pg_upgrade. Doubt keeps.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from agent.domain.catalog import Backup
from agent.domain.inventory import Inventory, TimelineMap, Trust
from agent.domain.wal import segment_position
from agent.domain.wal_runs import merged
from agent.errors import ConfigError

LEFTOVER_AGE = timedelta(hours=48)
"""Nothing was stored for so long in the folder of a backup without a sentinel: it is not being taken any more."""

_ASIDE = ", worse ones aside"
_FLAWS = {
    Trust.DAMAGED: "; it is damaged, and replaces none that is not",
    Trust.CORRUPT_PAGES: "; it has {} corrupt pages, and replaces none that has none",
    Trust.SOUND: "",
}

_WINDOW = re.compile(r"(\d{1,6})([hdw])")
_HOURS = {"h": 1, "d": 24, "w": 168}
_LONGEST = timedelta(days=365_000)  # a thousand years: what is longer may begin before the year 1, and keeps no more
_COUNT = re.compile(r"full=(\d{1,6})")


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """What is promised to stay. At least one is set: `window` back from now, `full`: that many full backups."""

    window: timedelta | None = None
    full: int | None = None

    def __str__(self) -> str:
        hours = self.window // timedelta(hours=1) if self.window else 0
        window = f"{hours // 24}d" if hours % 24 == 0 else f"{hours}h"
        parts = [window] if hours else []
        return ",".join([*parts, f"full={self.full}"] if self.full else parts)


def parse_retention(name: str, text: str) -> RetentionPolicy:
    """Read `14d`, `36h`, `2w`, `full=3`, or a window and a count as in `14d,full=3`.

    Raises:
        ConfigError: It is none of them, or keeps nothing; the message names the setting `name`.
    """
    window, full = timedelta(), 0
    for part in text.replace(" ", "").split(","):
        if (match := _WINDOW.fullmatch(part)) and not window:
            window = min(timedelta(hours=int(match[1]) * _HOURS[match[2]]), _LONGEST)
        elif (match := _COUNT.fullmatch(part)) and not full:
            full = int(match[1])
        else:
            window, full = timedelta(), 0
            break
    if not (window or full):
        raise ConfigError(f"{name}={text!r} is no retention", hint="Write for example 14d, full=3 or 14d,full=3.")
    return RetentionPolicy(window or None, full or None)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a base backup stays, and why. `wal_after`: with it all WAL after its start stays."""

    backup: Backup
    stays: bool
    reason: str
    wal_after: bool = False


@dataclass(frozen=True, slots=True)
class NeededWal:
    """Which WAL stays. Numbers are of segments, by timeline.

    everything: No base backup says what is not needed. ranges: What is needed; an end of None is open. followed: The
    timelines that a kept base backup leads to. spared_after: On others, what was stored after this time stays, too: a
    base backup of which nothing is stored yet may have begun there.
    """

    everything: bool
    ranges: Mapping[int, Sequence[tuple[int, int | None]]] = field(default_factory=dict)
    followed: Collection[int] = ()
    spared_after: datetime | None = None

    def keeps(self, timeline: int, number: int, stored_at: datetime) -> bool:
        """Tell whether the segment `number` of `timeline` stays, and with it what is named after it."""
        if self.everything:
            return True
        if timeline not in self.followed and self.spared_after is not None and stored_at > self.spared_after:
            return True
        ranges = self.ranges.get(timeline, ())
        return any(first <= number and (end is None or number < end) for first, end in ranges)

    def left_of(self, timeline: int, held: Sequence[range]) -> list[range]:
        """Return what stays of the archived segments `held` of `timeline`, without what is only spared for a while."""
        if self.everything:
            return list(held)
        return [
            range(max(each.start, first), each.stop if end is None else min(each.stop, end))
            for each in held
            for first, end in self.ranges.get(timeline, ())
            if first < each.stop and (end is None or each.start < end)
        ]


def decide(inventory: Inventory, policy: RetentionPolicy) -> list[Verdict]:
    """Return a verdict for every base backup, in the order of the inventory."""
    return _Decision(inventory, policy).verdicts()


def needed_wal(inventory: Inventory, kept: Sequence[Verdict]) -> NeededWal:
    """Return which WAL the `kept` base backups, and those in progress, need."""
    world = TimelineMap(inventory)
    starts = [(v.backup.timeline, world.numbers(v.backup).start, v.backup.finish_lsn) for v in kept if v.wal_after]
    if not starts:
        # Nothing but pinned ones: they are all that leads to the present.
        starts = [(v.backup.timeline, world.numbers(v.backup).start, v.backup.finish_lsn) for v in kept]
    if not starts:
        return NeededWal(everything=True)
    for name in inventory.unfinished:
        if (position := segment_position(name[5:29], inventory.segment_bytes)) is not None:
            starts.append((*position, position[1] * inventory.segment_bytes))
    ranges: dict[int, list[tuple[int, int | None]]] = {}
    followed: set[int] = set()
    for timeline, first, lsn in starts:
        for target in world.timelines:
            stretches = world.stretches_from(timeline, lsn, target)
            followed.update([target] if stretches else [])
            for stretch in stretches:
                begin = max(first, stretch.from_lsn // inventory.segment_bytes)
                end = None if stretch.to_lsn is None else stretch.to_lsn // inventory.segment_bytes + 1
                ranges.setdefault(stretch.timeline, []).append((begin, end))
    for verdict in kept:
        own = world.numbers(verdict.backup)
        ranges.setdefault(verdict.backup.timeline, []).append((own.start, own.stop))
    return NeededWal(
        everything=False,
        ranges={timeline: _fewest(found) for timeline, found in ranges.items()},
        followed=followed,
        spared_after=inventory.now - LEFTOVER_AGE,
    )


def _moment(backup: Backup) -> datetime:
    """Return when the backup was finished for certain, should one of the two clocks be wrong."""
    return max(backup.finish_time, backup.modified_at)


def _is_newer(one: Backup, other: Backup) -> bool:
    return one.finish_time > other.finish_time and one.modified_at > other.modified_at


def _fewest(found: Iterable[tuple[int, int | None]]) -> list[tuple[int, int | None]]:
    found = list(found)
    opened = min((first for first, end in found if end is None), default=None)
    closed = merged(range(first, end) for first, end in found if end is not None)
    if opened is None:
        return [(each.start, each.stop) for each in closed]
    return [*((each.start, min(each.stop, opened)) for each in closed if each.start < opened), (opened, None)]


class _Decision:
    """One policy upon one inventory. `_reasons` grows: who is in it stays."""

    def __init__(self, inventory: Inventory, policy: RetentionPolicy) -> None:
        self._inventory = inventory
        self._policy = policy
        self._world = TimelineMap(inventory)
        self._backups = inventory.backups
        self._reasons: dict[str, str] = {}

    def verdicts(self) -> list[Verdict]:
        if self._policy.window is not None:
            self._keep_window(self._inventory.now - self._policy.window)
        if self._policy.full is not None:
            self._keep_count(self._policy.full)
        self._keep_last_resort()
        self._keep_what_is_in_use()
        promised = set(self._reasons)
        for backup in self._backups:
            if backup.permanent:
                self._keep(backup, "pinned")
        self._keep_parents()
        return [self._verdict(backup, promised) for backup in self._backups]

    def _verdict(self, backup: Backup, promised: Collection[str]) -> Verdict:
        reason = self._reasons.get(backup.name)
        flaw = _FLAWS[self._world.trust(backup)].format(backup.corrupt_pages)
        if reason is None:
            return Verdict(backup, stays=False, reason=self._why_it_goes(backup) + flaw)
        return Verdict(backup, True, reason + flaw, wal_after=backup.name in promised or not backup.permanent)

    def _why_it_goes(self, backup: Backup) -> str:
        if self._world.chain(backup) is None:
            return f"nothing needs it, and it builds on {backup.parent}, which is missing or incomplete"
        reasons = []
        if self._policy.window is not None:
            begin = self._inventory.now - self._policy.window
            reasons.append(f"not needed for the window, which begins {begin:%Y-%m-%d %H:%M} UTC")
        if self._policy.full is not None:
            full = self._policy.full
            reasons.append(f"not one of the newest {full} full backups" if full > 1 else "not the newest full backup")
        return " and ".join(reasons)

    def _keep(self, backup: Backup, reason: str) -> None:
        self._reasons.setdefault(backup.name, reason)

    def _keep_window(self, begin: datetime) -> None:
        for backup in self._backups:
            if _moment(backup) > begin:
                self._keep(backup, "in the window")
        before = [backup for backup in self._backups if _moment(backup) <= begin]
        written = self._world.written_since(begin)
        for cluster in {self._cluster(backup) for backup in before}:
            ours = [backup for backup in before if self._cluster(backup) == cluster]
            if self._is_succeeded(cluster, before):
                continue
            for timeline in written:
                self._keep_anchor([backup for backup in ours if self._world.leads_to(backup, timeline)], timeline)

    def _keep_anchor(self, before: Sequence[Backup], timeline: int) -> None:
        """Keep the newest intact one of `before`, which lead to `timeline`; all of them if none is intact."""
        intact = [backup for backup in before if self._world.problem(backup, timeline) is None]
        if not intact:
            for backup in before:
                self._keep(backup, "the window needs it: no intact one replaces it")
        for better, aside in self._better_and_better(intact):
            newest = max(better, key=lambda each: (each.finish_lsn, _moment(each)))
            self._keep(newest, f"the window needs it: the newest from before it on timeline {timeline}{aside}")

    def _better_and_better(self, backups: Sequence[Backup]) -> Iterator[tuple[Sequence[Backup], str]]:
        """Yield `backups`, then those that are better than the worst, and so on to the best; each with words for it."""
        aside = ""
        for level in sorted({self._world.trust(backup) for backup in backups}):
            yield [backup for backup in backups if self._world.trust(backup) >= level], aside
            aside = _ASIDE

    def _cluster(self, backup: Backup) -> int | None:
        """Return the database cluster; a backup that does not say is taken for the only one's."""
        known = {each.system_identifier for each in self._backups} - {None}
        return next(iter(known)) if len(known) == 1 else backup.system_identifier

    def _is_succeeded(self, cluster: int | None, before: Sequence[Backup]) -> bool:
        """Tell whether another cluster took over all of this repository before the window began."""
        ours = [backup for backup in self._backups if self._cluster(backup) == cluster]
        others = [b for b in before if self._cluster(b) != cluster and self._world.intact(b)]
        return any(
            all(_is_newer(other, each) and self._world.trust(other) >= self._world.trust(each) for each in ours)
            for other in others
        )

    def _keep_count(self, count: int) -> None:
        fulls = [b for b in self._backups if not b.is_delta and not b.permanent and self._world.intact(b)]
        newest = f"one of the newest {count} full backups" if count > 1 else "the newest full backup"
        for backup in self._backups:
            chain = self._world.chain(backup)
            if chain is None or (backup.permanent and not backup.is_delta):
                continue
            newer = [full for full in fulls if self._replaces(full, chain[-1])]
            if sum(self._world.trust(full) >= self._world.trust(backup) for full in newer) < count:
                aside = _ASIDE if len(newer) >= count else ""
                self._keep(backup, f"delta of {newest}{aside}" if backup.is_delta else newest + aside)

    def _replaces(self, full: Backup, root: Backup) -> bool:
        """Tell whether `full` is newer than `root`, and leads to the timeline written last if `root` does."""
        world, present = self._world, self._world.last_written
        if present is not None and world.leads_to(root, present) and not world.leads_to(full, present):
            return False
        return _is_newer(full, root)

    def _keep_last_resort(self) -> None:
        timeline = self._world.last_written
        leading = [b for b in self._backups if timeline is not None and self._world.leads_to(b, timeline)]
        intact = [b for b in leading if timeline is not None and self._world.problem(b, timeline) is None]
        where = f"leads to timeline {timeline}, which was written last" if leading else "is left"
        for candidates, aside in self._better_and_better(intact or leading or self._backups):
            if not any(backup.name in self._reasons for backup in candidates):
                self._keep(max(candidates, key=_moment), f"nothing else {where}{aside}")

    def _keep_what_is_in_use(self) -> None:
        for backup in self._backups:
            if backup.name in self._inventory.restoring:
                self._keep(backup, "it is being restored")
            elif self._inventory.is_built_on(backup):
                self._keep(backup, "a base backup in progress builds on it")

    def _keep_parents(self) -> None:
        for backup in self._backups:
            if backup.name in self._reasons:
                for parent in self._world.ancestors(backup):
                    self._keep(parent, f"{backup.name} builds on it")
