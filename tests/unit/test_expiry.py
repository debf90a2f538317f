"""Expiry on a store: in a safe order, again after it was killed, around what is locked, beside others at work."""

import asyncio
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest
from prometheus_client import CollectorRegistry

from agent.domain.retention import RetentionPolicy, parse_retention
from agent.domain.verification_order import VerificationRecord
from agent.domain.wal import segment_name
from agent.errors import ConfigError, RepositoryCorrupt, RepositoryRefused, RepositoryUnavailable
from agent.expire.by_name import delete, pin, unpin
from agent.expire.expiry import Expiry, ExpiryPlan
from agent.ports import Body, Deletion
from agent.repository.backups import read_catalog
from agent.repository.keys import backup_folder, metadata_key, sentinel_key, tar_folder
from agent.repository.restore_lease import LEASE_AGE, restore_lease
from agent.repository.verification_record import write_record
from agent.repository.wal_archive import WalArchive
from agent.storage.memory import MemoryObjectStore
from agent.telemetry.metrics import Metrics
from tests.support.object_formats import ZSTD

SEGMENT_BYTES = 1 << 20
TIMELINE_1 = "00000001"


class Calendar:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.time = datetime(2026, 1, 1, tzinfo=UTC)

    def now(self) -> datetime:
        return self.time

    def monotonic(self) -> float:
        return self.time.timestamp()

    async def sleep(self, seconds: float) -> None:
        self.time += timedelta(seconds=seconds)


class Killed(BaseException):
    """The process ends here."""


class Store(MemoryObjectStore):
    """Removes one object at a time, and is killed after so many; what is `locked` is not removed."""

    def __init__(self, clock: Calendar) -> None:
        super().__init__(clock)
        self.removed: list[str] = []
        self.locked: set[str] = set()
        self.lives = 1_000_000

    async def delete_many(self, keys: Sequence[str]) -> Deletion:
        failed = {}
        for key in keys:
            if self.lives == 0:
                raise Killed
            if key in self.locked:
                failed[key] = RepositoryRefused("the store answered AccessDenied (object is WORM protected)")
                continue
            self.lives -= 1
            self.removed.append(key)
            await self.delete([key])
        return Deletion(failed)


class Repository:
    """A repository of one cluster: one segment a day, base backups when a test says so."""

    def __init__(self) -> None:
        self.clock = Calendar()
        self.store = Store(self.clock)
        self.metrics = Metrics(CollectorRegistry())
        self.archive = WalArchive(self.store, ZSTD)
        self.expiry = Expiry(self.store, self.archive, self.clock, self.metrics)
        self.number = 1

    async def days(self, count: int) -> None:
        for _ in range(count):
            self.clock.time += timedelta(days=1)
            await self.store.put(f"wal_005/{self.segment(self.number)}.zst", b"wal")
            self.number += 1

    @staticmethod
    def segment(number: int, timeline: int = 1) -> str:
        return segment_name(timeline, number * SEGMENT_BYTES, SEGMENT_BYTES)

    async def back_up(
        self, *, parent: str | None = None, pinned: bool = False, complete: bool = True, corrupt_pages: int | None = 0
    ) -> str:
        """Take a base backup of a day; return its name."""
        start = self.number * SEGMENT_BYTES + 40
        name = f"base_{self.segment(self.number)}" + (f"_D_{parent[5:29]}" if parent else "")
        began = self.clock.now()
        await self.days(1)
        await self.store.put(f"wal_005/{name[5:29]}.00000028.backup.zst", b"history")
        times = {"start_time": f"{began.isoformat()}", "finish_time": self.clock.now().isoformat()}
        await self.store.put(f"{tar_folder(name)}part_001.tar.zst", b"x" * 100)
        await self.store.put(f"{tar_folder(name)}pg_control.tar.zst", b"x")
        if complete:
            await self.store.put(metadata_key(name), json.dumps({**times, "is_permanent": pinned}).encode())
            sentinel: dict[str, object] = {
                "LSN": start,
                "FinishLSN": self.number * SEGMENT_BYTES,
                "SystemIdentifier": 1,
                "PgVersion": 150000,
                "CompressedSize": 101,
                "PitrCorruptPages": corrupt_pages,  # null as if it said nothing
            }
            if parent:
                depth = parent.count("_D_") + 1
                sentinel |= {"DeltaLSN": 1, "DeltaFrom": parent, "DeltaFullName": parent, "DeltaCount": depth}
            await self.store.put(sentinel_key(name), json.dumps(sentinel).encode())
        return name

    async def names(self) -> list[str]:
        return [backup.name for backup in await read_catalog(self.store)]

    async def keys(self, prefix: str = "") -> list[str]:
        return [info.key async for info in self.store.list(prefix)]

    async def segments(self) -> list[str]:
        return [key[8:32] for key in await self.keys("wal_005/") if key.endswith(".zst") and len(key) == 36]


def reasons(plan: ExpiryPlan) -> dict[str, str]:
    return {verdict.backup.name: verdict.reason for verdict in plan.verdicts}


@pytest.fixture
def repository() -> Repository:
    return Repository()


FULL_1, FULL_2, WEEK = RetentionPolicy(full=1), RetentionPolicy(full=2), RetentionPolicy(timedelta(days=7))


async def test_a_plan_changes_nothing_and_says_why_and_how_much(repository: Repository) -> None:
    old = await repository.back_up()
    await repository.days(9)
    anchor = await repository.back_up()
    await repository.days(8)
    new = await repository.back_up()
    before = await repository.keys()
    plan = await repository.expiry.plan(WEEK)
    assert await repository.keys() == before
    assert [backup.name for backup in plan.going] == [old]
    assert "from before it on timeline 1" in reasons(plan)[anchor]
    assert reasons(plan)[new] == "in the window"
    assert (plan.backups.objects, plan.wal.objects) == (4, 11)  # ten days and a backup history file
    assert plan.total.stored_bytes == plan.backups.stored_bytes + plan.wal.stored_bytes
    assert plan.window_before is not None
    assert plan.window_after is not None
    assert plan.window_before < plan.window_after <= plan.survey.inventory.now - timedelta(days=7)


async def test_the_window_of_a_copied_bucket_begins_when_its_backup_ended(repository: Repository) -> None:
    """Not when the objects were stored there."""
    await repository.back_up()
    await repository.days(20)
    for key in await repository.keys():
        stored = await repository.store.get(key)
        assert stored is not None
        await repository.store.put(key, stored.body)
    plan = await repository.expiry.plan(WEEK)
    (backup,) = await read_catalog(repository.store)
    assert plan.window_before == plan.window_after == backup.finish_time < backup.modified_at


async def test_what_a_policy_does_not_keep_is_removed_and_nothing_else(repository: Repository) -> None:
    names = []
    for _ in range(4):
        names.append(await repository.back_up())
        await repository.days(2)
    foreign = ["other/file", "wal_005/notes.txt", "basebackups_005/mine/x", "wal_005/00000002.history.zst"]
    for key in foreign[:3]:
        await repository.store.put(key, b"x")
    await repository.store.put(foreign[3], ZSTD.encode(f"1\t0/{13 << 20:X}\tx\n".encode()))
    plan, removal = await repository.expiry.expire(FULL_2)
    assert await repository.names() == names[2:]
    assert await repository.segments() == [repository.segment(number) for number in range(7, 13)]
    assert set(foreign) <= set(await repository.keys())
    assert await repository.keys(backup_folder(names[0])) == []
    assert (removal.wal.objects, removal.backups.objects) == (plan.wal.objects, plan.backups.objects)
    assert removal.wal.stored_bytes + removal.backups.stored_bytes == plan.total.stored_bytes
    _, again = await repository.expiry.expire(FULL_2)
    assert again.wal.objects == again.backups.objects == 0


async def test_sentinels_go_before_data_children_before_parents_and_wal_last(repository: Repository) -> None:
    full = await repository.back_up()
    delta = await repository.back_up(parent=full)
    deeper = await repository.back_up(parent=delta)
    await repository.days(1)
    await repository.back_up()
    await repository.expiry.expire(FULL_1)
    removed = repository.store.removed
    assert removed[:3] == [sentinel_key(deeper), sentinel_key(delta), sentinel_key(full)]
    kinds = [key.partition("/")[0] for key in removed]
    assert kinds == sorted(kinds)
    assert len(await repository.names()) == 1


async def test_killed_anywhere_nothing_looks_whole_and_the_next_expiry_goes_on(repository: Repository) -> None:
    lives, finished = 0, False
    while not finished:
        repository = Repository()
        full = await repository.back_up()
        await repository.back_up(parent=full)
        await repository.days(3)
        kept = await repository.back_up()
        repository.store.lives = lives
        try:
            await repository.expiry.expire(FULL_1)
            finished = True
        except Killed:
            pass
        for backup in await read_catalog(repository.store, strict=True):
            assert f"{tar_folder(backup.name)}part_001.tar.zst" in await repository.keys()
            assert backup.start_segment in await repository.segments()
            assert backup.parent is None or backup.parent in await repository.names()
        repository.store.lives = 1_000_000
        await repository.expiry.expire(FULL_1)
        assert await repository.names() == [kept]
        assert {key.split("/")[1][:29] for key in await repository.keys("basebackups_005/")} == {kept}
        assert await repository.segments() == [kept[5:29]]
        lives += 1
    assert lives > 10


@pytest.mark.parametrize("flaw", ["corrupt pages", "a tar is gone", "read back damaged"])
@pytest.mark.parametrize("policy", [FULL_1, WEEK, FULL_2])
async def test_what_is_flawed_replaces_nothing_that_is_whole(
    repository: Repository, policy: RetentionPolicy, flaw: str
) -> None:
    oldest = await repository.back_up()
    good = await repository.back_up()
    delta = await repository.back_up(parent=good)
    await repository.days(9)
    flawed = []
    for _ in range(3):
        name = await repository.back_up(corrupt_pages=2 if flaw == "corrupt pages" else 0)
        if flaw == "a tar is gone":
            await repository.store.delete([f"{tar_folder(name)}part_001.tar.zst"])
        elif flaw == "read back damaged":
            record = VerificationRecord(problems=("part_001.tar.zst is damaged",))
            await write_record(repository.store, name, record)
        await repository.days(9)
        flawed.append(name)
    plan, _ = await repository.expiry.expire(policy)
    kept = flawed[-2:] if policy is FULL_2 else flawed[-1:]
    assert await repository.names() == [*([oldest] if policy is FULL_2 else []), good, delta, *kept]
    assert (await repository.segments())[0] == (oldest if policy is FULL_2 else good)[5:29]
    assert "worse ones aside" in reasons(plan)[delta]
    assert "replaces none that" in reasons(plan)[flawed[-1]]
    await repository.back_up()
    last = await repository.back_up()
    await repository.days(9)
    await repository.expiry.expire(policy)
    assert (await repository.names())[-1] == last
    assert not {oldest, good, delta} & set(await repository.names())


async def test_a_delta_of_what_is_damaged_replaces_nothing_but_one_of_corrupt_pages_may(repository: Repository) -> None:
    whole = await repository.back_up()
    parent = await repository.back_up(corrupt_pages=1)
    delta = await repository.back_up(parent=parent)
    await repository.days(9)
    assert [backup.name for backup in (await repository.expiry.plan(WEEK)).going] == [whole]
    await repository.store.delete([f"{tar_folder(parent)}part_001.tar.zst"])
    plan = await repository.expiry.plan(WEEK)
    assert plan.going == []
    assert "it is damaged" in reasons(plan)[delta]


async def test_a_delta_that_counts_no_corrupt_pages_has_those_of_its_parent(repository: Repository) -> None:
    whole = await repository.back_up(corrupt_pages=None)
    parent = await repository.back_up(corrupt_pages=2)
    delta = await repository.back_up(parent=parent, corrupt_pages=None)
    last = await repository.back_up(parent=delta, corrupt_pages=None)
    await repository.days(9)
    plan = await repository.expiry.plan(WEEK)
    assert plan.going == []
    assert "it has 2 corrupt pages" in reasons(plan)[last]
    assert "corrupt" not in reasons(plan)[whole]


async def test_wal_after_a_pinned_backup_stays_while_all_that_is_newer_is_damaged(repository: Repository) -> None:
    pinned = await repository.back_up(pinned=True)
    await repository.days(3)
    newer = await repository.back_up()
    await repository.days(3)
    await repository.store.delete([f"{tar_folder(newer)}part_001.tar.zst"])
    before = await repository.segments()
    await repository.expiry.expire(FULL_1)
    assert await repository.names() == [pinned, newer]
    assert await repository.segments() == before


async def test_what_is_locked_is_told_and_the_rest_goes(repository: Repository) -> None:
    full = await repository.back_up()
    delta = await repository.back_up(parent=full)
    other = await repository.back_up()
    await repository.days(2)
    newest = await repository.back_up()
    repository.store.locked = {sentinel_key(delta), f"wal_005/{repository.segment(1)}.zst"}
    _, removal = await repository.expiry.expire(FULL_1)
    assert list(removal.failed) == [sentinel_key(delta)]
    with pytest.raises(RepositoryRefused, match=f"{delta}.*WORM"):
        removal.raise_if_incomplete()
    assert await repository.names() == [full, delta, newest]
    assert await repository.keys(backup_folder(other)) == []
    assert (await repository.segments())[0] == repository.segment(1)  # the locked one's parent still needs it
    assert repository.metrics.registry.get_sample_value("pitr_expire_failures_total") == 1
    repository.store.locked = {f"wal_005/{repository.segment(1)}.zst"}
    _, removal = await repository.expiry.expire(FULL_1)
    assert list(removal.failed) == list(repository.store.locked)
    assert await repository.names() == [newest]
    assert await repository.segments() == [repository.segment(1), newest[5:29]]


async def test_a_backup_in_progress_and_what_it_needs_stay(repository: Repository) -> None:
    parent = await repository.back_up()
    await repository.back_up()
    running = await repository.back_up(parent=parent, complete=False)
    last = await repository.back_up()
    plan, _ = await repository.expiry.expire(FULL_1)
    assert reasons(plan)[parent] == "a base backup in progress builds on it"
    assert await repository.names() == [parent, last]
    assert len(await repository.keys(backup_folder(running))) == 2
    await repository.days(3)  # nobody goes on with it
    plan, _ = await repository.expiry.expire(FULL_1)
    assert plan.survey.leftovers == [running]
    assert await repository.names() == [last]
    assert await repository.keys(backup_folder(running)) == []


async def test_a_backup_that_is_restored_stays_until_the_restore_has_ended(repository: Repository) -> None:
    old = await repository.back_up()
    await repository.back_up()
    async with restore_lease(repository.store, old, repository.clock):
        plan, _ = await repository.expiry.expire(FULL_1)
        assert reasons(plan)[old] == "it is being restored"
        assert repository.segment(1) in await repository.segments()
    assert not [key for key in await repository.keys() if "pitr_restore" in key]
    await repository.store.put(f"{backup_folder(old)}pitr_restore_killed.json", b"{}")
    repository.clock.time += LEASE_AGE - timedelta(minutes=1)
    assert (await repository.expiry.plan(FULL_1)).going == []
    repository.clock.time += timedelta(minutes=1)
    assert [backup.name for backup in (await repository.expiry.plan(FULL_1)).going] == [old]


async def test_a_restore_that_may_not_write_goes_on_without_a_lease(repository: Repository) -> None:
    class ReadOnly(MemoryObjectStore):
        async def put(self, key: str, body: Body, *, metadata: object = None) -> None:
            raise RepositoryRefused("AccessDenied")

    async with restore_lease(ReadOnly(), "base", repository.clock):
        pass


async def test_pinned_backups_keep_their_own_wal_and_no_more(repository: Repository) -> None:
    pinned = await repository.back_up(pinned=True)
    await repository.days(3)
    await repository.back_up()
    newest = await repository.back_up()
    plan, _ = await repository.expiry.expire(FULL_1)
    assert await repository.names() == [pinned, newest]
    assert await repository.segments() == [pinned[5:29], newest[5:29]]
    left = await repository.expiry.plan(FULL_1)
    assert left.window_before == plan.window_after != plan.window_before


async def test_nothing_goes_while_a_backup_cannot_be_understood(repository: Repository) -> None:
    damaged = await repository.back_up()
    await repository.back_up()
    await repository.store.put(metadata_key(damaged), b"{")
    with pytest.raises(RepositoryCorrupt, match=damaged):
        await repository.expiry.expire(FULL_1)
    assert repository.store.removed == []


async def test_nothing_goes_by_a_wrong_clock(repository: Repository) -> None:
    await repository.back_up()
    ahead = Calendar()
    ahead.time = repository.clock.time + timedelta(days=10)
    with pytest.raises(ConfigError, match="the store's clock says"):
        await Expiry(repository.store, repository.archive, ahead, repository.metrics).expire(WEEK)


async def test_a_backup_that_comes_while_it_is_decided_is_seen(repository: Repository) -> None:
    old = await repository.back_up()
    await repository.back_up()

    class Busy(Expiry):
        async def plan(self, policy: RetentionPolicy) -> ExpiryPlan:
            plan = await super().plan(policy)
            await repository.back_up(parent=old)
            return plan

    busy = Busy(repository.store, repository.archive, repository.clock, repository.metrics)
    with pytest.raises(RepositoryUnavailable, match="come or go"):
        await busy.expire(FULL_1)
    assert repository.store.removed == []


@pytest.mark.parametrize("text", ["999999d", "999999w"])
async def test_a_window_longer_than_the_calendar_keeps_everything(repository: Repository, text: str) -> None:
    names = [await repository.back_up(), await repository.back_up()]
    await repository.expiry.expire(parse_retention("x", text))
    assert await repository.names() == names


@pytest.mark.parametrize("use", ["pin", "restore"])
async def test_what_comes_into_use_while_it_is_decided_stays(repository: Repository, use: str) -> None:
    old = await repository.back_up()
    newest = await repository.back_up()

    class Busy(Expiry):
        async def plan(self, policy: RetentionPolicy) -> ExpiryPlan:
            plan = await super().plan(policy)
            if use == "pin":
                await pin(repository.store, old)
            else:
                await repository.store.put(f"{backup_folder(old)}pitr_restore_begun.json", b"{}")
            return plan

    busy = Busy(repository.store, repository.archive, repository.clock, repository.metrics)
    await busy.expire(FULL_1)
    assert await repository.names() == [old, newest]
    assert old[5:29] in await repository.segments()


@pytest.mark.parametrize("policies", [(FULL_1, FULL_2), (FULL_2, FULL_1), (FULL_1, FULL_1), (WEEK, FULL_1)])
async def test_two_that_expire_at_once_leave_only_what_is_whole(
    repository: Repository, policies: Sequence[RetentionPolicy]
) -> None:
    for _ in range(3):
        full = await repository.back_up()
        await repository.back_up(parent=full)
        await repository.days(3)
    last = await repository.back_up()
    outcomes = await asyncio.gather(*map(repository.expiry.expire, policies), return_exceptions=True)
    assert all(isinstance(each, RepositoryUnavailable) for each in outcomes if isinstance(each, BaseException))
    catalog = await read_catalog(repository.store, strict=True)
    assert last in [backup.name for backup in catalog]
    for backup in catalog:
        assert len(await repository.keys(tar_folder(backup.name))) == 2
        assert backup.parent is None or backup.parent in [each.name for each in catalog]
    held = await repository.segments()
    needed = [repository.segment(number) for number in range(int(catalog[0].name[21:29], 16), repository.number)]
    assert set(needed) <= set(held)


async def test_pinning_a_delta_pins_what_it_builds_on(repository: Repository) -> None:
    full = await repository.back_up()
    delta = await repository.back_up(parent=full)
    other = await repository.back_up()
    await repository.store.put(metadata_key(full), b'{"is_permanent":false,"hostname":"pg-0","system_identifier":1}')
    assert await pin(repository.store, delta) == [full, delta]
    assert await pin(repository.store, delta) == []
    assert [backup.permanent for backup in await read_catalog(repository.store)].count(True) == 2
    stored = await repository.store.get(metadata_key(full))
    assert stored is not None
    assert json.loads(stored.body) == {"is_permanent": True, "hostname": "pg-0", "system_identifier": 1}
    await repository.expiry.expire(FULL_1)
    assert set(await repository.names()) == {full, delta, other}
    with pytest.raises(ConfigError, match=f"{delta}, which is pinned, builds on"):
        await unpin(repository.store, full)
    assert await unpin(repository.store, delta) == [delta]
    assert await unpin(repository.store, full) == [full]
    with pytest.raises(ConfigError, match="there is no base backup base_x"):
        await pin(repository.store, "base_x")


async def test_a_backup_is_deleted_by_name_unless_something_hangs_on_it(repository: Repository) -> None:
    full = await repository.back_up()
    delta = await repository.back_up(parent=full)
    pinned = await repository.back_up(pinned=True)
    running_on = await repository.back_up()
    await repository.back_up(parent=running_on, complete=False)
    args = (repository.store, repository.archive, repository.clock)
    for name, reason in ((full, f"{delta} builds on"), (pinned, "is pinned"), (running_on, "in progress builds on")):
        with pytest.raises(ConfigError, match=reason):
            await delete(*args, name, with_dependents=False)
    async with restore_lease(repository.store, delta, repository.clock):
        with pytest.raises(ConfigError, match="is being restored"):
            await delete(*args, full, with_dependents=True)
    assert repository.store.removed == []
    wal = await repository.segments()
    gone, removal = await delete(*args, full, with_dependents=True)
    assert (gone, removal.failed) == ([delta, full], {})
    assert repository.store.removed[:2] == [sentinel_key(delta), sentinel_key(full)]
    assert await repository.names() == [pinned, running_on]
    assert await repository.segments() == wal


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("14d", RetentionPolicy(timedelta(days=14))),
        ("36h", RetentionPolicy(timedelta(hours=36))),
        ("2w", RetentionPolicy(timedelta(days=14))),
        ("full=3", RetentionPolicy(full=3)),
        ("14d, full=3", RetentionPolicy(timedelta(days=14), 3)),
        ("full=3,14d", RetentionPolicy(timedelta(days=14), 3)),
    ],
)
def test_a_retention_is_read(text: str, policy: RetentionPolicy) -> None:
    assert parse_retention("x", text) == policy
    assert parse_retention("x", str(policy)) == policy


@pytest.mark.parametrize(
    "text", ["", "14", "0d", "full=0", "-1d", "1d,2d", "full=1,full=2", "3", "all", "14d,", "1.5d"]
)
def test_a_retention_that_keeps_nothing_or_is_misspelt_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="PITR_RETENTION"):
        parse_retention("PITR_RETENTION", text)
