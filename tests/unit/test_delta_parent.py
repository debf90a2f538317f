"""A delta builds only on what leads to it, and no chain grows longer than it may."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis.strategies import booleans, integers

from agent.domain.catalog import Backup
from agent.domain.delta_parent import BackupKind, DeltaParent, DeltaPolicy, NewBackup, NoParent, choose_parent
from agent.domain.timeline import Ancestor, path_to

AUTO, DELTA = BackupKind.AUTO, BackupKind.DELTA
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
THREE = DeltaPolicy(max_steps=3)


def backup(number: int, parent: Backup | None = None, *, timeline: int = 1) -> Backup:
    """Return the backup that took the LSNs from `number` * 16 MiB on."""
    name = f"base_{timeline:08X}00000000{number:08X}"
    if parent is not None:
        name += f"_D_{parent.start_segment}"
    return Backup(
        name=name, timeline=timeline, start_lsn=number << 24, finish_lsn=(number << 24) + 200,
        start_time=BEGIN + timedelta(hours=number), finish_time=BEGIN + timedelta(hours=number, minutes=1),
        modified_at=BEGIN + timedelta(hours=number, minutes=1), pg_version=150004, system_identifier=7, size_bytes=1,
        stored_bytes=1, permanent=False, parent=parent.name if parent else None,
        full=(parent.full or parent.name) if parent else None, delta_count=parent.delta_count + 1 if parent else 0,
    )  # fmt: skip


FULL = backup(1)
FIRST = backup(2, FULL)
SECOND = backup(3, FIRST)
NEW = NewBackup(10 << 24, path_to(1, ()), 7, 150009, permanent=False)


def reason(found: DeltaParent | NoParent) -> str:
    assert isinstance(found, NoParent)
    return found.reason


def test_the_newest_is_the_parent() -> None:
    found = choose_parent(AUTO, [FULL, FIRST, SECOND], THREE, NEW)
    assert found == DeltaParent(SECOND, (SECOND.name, FIRST.name, FULL.name), 3)


@given(integers(0, 5), booleans())
def test_the_count_never_exceeds_the_steps_allowed(steps: int, from_full: bool) -> None:
    catalog, taken = [FULL], []
    for number in range(2, 9):
        found = choose_parent(AUTO, catalog, DeltaPolicy(steps, from_full), replace(NEW, start_lsn=number << 24))
        parent = found.backup if isinstance(found, DeltaParent) else None
        count = found.count if isinstance(found, DeltaParent) else 0
        catalog.append(replace(backup(number, parent), delta_count=count))
        taken.append(count)
    assert taken == [number % (steps + 1) for number in range(1, 8)]


def test_with_latest_full_each_delta_builds_on_the_full_one() -> None:
    found = choose_parent(AUTO, [FULL, FIRST, SECOND], DeltaPolicy(3, from_full=True), NEW)
    assert found == DeltaParent(FULL, (FULL.name,), 3)


def test_without_steps_deltas_are_taken_only_on_demand() -> None:
    assert "WALG_DELTA_MAX_STEPS" in reason(choose_parent(AUTO, [FULL], DeltaPolicy(), NEW))
    assert choose_parent(DELTA, [FULL], DeltaPolicy(), NEW) == DeltaParent(FULL, (FULL.name,), 1)
    assert "asked for" in reason(choose_parent(BackupKind.FULL, [FULL], THREE, NEW))


def test_a_named_parent_is_taken_or_none() -> None:
    found = choose_parent(AUTO, [FULL, FIRST], DeltaPolicy(3, from_name=FULL.name), NEW)
    assert found == DeltaParent(FULL, (FULL.name,), 1)
    assert "is not in the repository" in reason(
        choose_parent(AUTO, [FULL], DeltaPolicy(3, from_name="base_of_nobody"), NEW)
    )


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (replace(FULL, system_identifier=8), "database cluster 8"),
        (replace(FULL, system_identifier=None), "database cluster None"),
        (replace(FULL, pg_version=140010), "PostgreSQL 14"),
        (replace(FULL, timeline=2), "timeline 2"),
        (replace(FULL, finish_lsn=11 << 24), "after the start"),
    ],
)
def test_a_backup_of_something_else_is_no_parent(other: Backup, said: str) -> None:
    assert said in reason(choose_parent(AUTO, [other], THREE, NEW))
    assert choose_parent(AUTO, [FULL, replace(other, name=SECOND.name)], THREE, NEW) == DeltaParent(
        FULL, (FULL.name,), 1
    )


def test_a_parent_on_an_earlier_timeline_must_have_ended_before_it_was_left() -> None:
    for switch, fits in ((FULL.finish_lsn, True), (FULL.finish_lsn - 1, False)):
        new = replace(NEW, path=path_to(2, (Ancestor(1, switch),)))
        assert isinstance(choose_parent(AUTO, [FULL], THREE, new), DeltaParent) is fits


def test_a_chain_with_a_hole_is_not_continued() -> None:
    assert FIRST.name in reason(choose_parent(AUTO, [FULL, SECOND], THREE, NEW))


def test_what_may_expire_does_not_depend_on_what_is_pinned() -> None:
    pinned = replace(FULL, permanent=True)
    assert "permanent" in reason(choose_parent(AUTO, [pinned], THREE, NEW))
    assert isinstance(choose_parent(AUTO, [pinned], THREE, replace(NEW, permanent=True)), DeltaParent)
    assert isinstance(choose_parent(AUTO, [pinned], DeltaPolicy(3, from_full=True), NEW), DeltaParent)


def test_an_empty_repository_begins_with_a_full_one() -> None:
    assert "no base backup" in reason(choose_parent(AUTO, [], THREE, NEW))
