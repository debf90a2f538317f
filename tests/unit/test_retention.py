"""Retention never takes what a kept point needs, and leaves nothing that none needs."""

from dataclasses import replace
from datetime import datetime, timedelta

import pytest
from hypothesis import given, settings

from agent.domain.catalog import Backup
from agent.domain.retention import (
    NeededWal,
    RetentionPolicy,
    Verdict,
    decide,
    needed_wal,
)
from agent.domain.wal_runs import merged
from agent.domain.window import window_begin
from tests.support.retention_world import SEGMENT_BYTES, Past, pasts, policies


def expire(past: Past, policy: RetentionPolicy) -> tuple[list[Verdict], NeededWal, set[str], set[tuple[int, int]]]:
    """Return what the rules say, and which backups and segments are left."""
    inventory = past.inventory()
    verdicts = decide(inventory, policy)
    kept = [verdict for verdict in verdicts if verdict.stays]
    needed = needed_wal(inventory, kept)
    wal = {(t, n) for (t, n), stored_at in past.stored_at.items() if needed.keeps(t, n, stored_at)}
    return verdicts, needed, {verdict.backup.name for verdict in kept}, wal


@settings(max_examples=300, deadline=None)
@given(pasts(), policies())
def test_what_the_window_promises_can_be_restored_after_expiry(past: Past, policy: RetentionPolicy) -> None:
    _, _, present, wal = expire(past, policy)
    names = {backup.name for backup in past.backups}
    if policy.window is not None:
        begin = past.now - policy.window
        for point in past.points:
            if point.time >= begin and (able := past.restorers(point, names, past.stored_at)):
                left = past.restorers(point, present, wal)
                assert max(map(past.trust, left), default=-1) >= max(map(past.trust, able)), point


@settings(max_examples=250, deadline=None)
@given(pasts(), policies())
def test_every_kept_backup_still_reaches_all_that_it_reached(past: Past, policy: RetentionPolicy) -> None:
    verdicts, _, present, wal = expire(past, policy)
    names = {backup.name for backup in past.backups}
    after = {verdict.backup.name for verdict in verdicts if verdict.wal_after}
    for point in past.points:
        able = {backup.name for backup in past.restorers(point, names, past.stored_at)}
        assert able & after <= {backup.name for backup in past.restorers(point, present, wal)}
    for verdict in verdicts:
        if verdict.stays:
            own = {(t, n) for t, n in past.segments(verdict.backup, verdict.backup.timeline, verdict.backup.finish_lsn)}
            assert own & set(past.stored_at) <= wal
            assert verdict.backup.parent in {*present, *({verdict.backup.parent} - names)}


@settings(max_examples=300, deadline=None)
@given(pasts(), policies())
def test_the_window_that_is_promised_is_that_of_what_is_left(past: Past, policy: RetentionPolicy) -> None:
    _, needed, present, _ = expire(past, policy)
    inventory = past.inventory()
    lasting = replace(needed, spared_after=None)
    wal = {(t, n) for (t, n), stored_at in past.stored_at.items() if lasting.keeps(t, n, stored_at)}
    before = inventory.holdings([backup for backup in past.backups if backup.name in present])
    promised = replace(before, wal={t: needed.left_of(t, held) for t, held in before.wal.items()})
    left = {t: merged(range(n, n + 1) for timeline, n in wal if timeline == t) for t, _ in wal}
    assert window_begin(promised) == window_begin(replace(before, wal=left))


@pytest.mark.parametrize("is_damaged", [False, True])
def test_another_cluster_takes_over_only_with_a_backup_that_is_no_worse(*, is_damaged: bool) -> None:
    past = Past()
    for past.cluster, past.timeline in ((1, 3), (2, 1)):  # as by pg_upgrade
        past.now += timedelta(days=30)
        past.back_up(hours=1, delta=False, pinned=False)
        past.write(2 * SEGMENT_BYTES)
    old, new = past.backups
    past.now += timedelta(days=30)
    past.damaged = {new.name} if is_damaged else set()
    _, _, present, wal = expire(past, RetentionPolicy(window=timedelta(days=7)))
    assert present == ({old.name, new.name} if is_damaged else {new.name})
    assert (set(past.segments(old, 3, old.finish_lsn)) <= wal) is is_damaged


@settings(max_examples=250, deadline=None)
@given(pasts(), policies())
def test_of_full_backups_at_least_as_many_stay_as_are_asked_for(past: Past, policy: RetentionPolicy) -> None:
    _, _, present, _ = expire(past, policy)
    assert {backup.name for backup in past.backups if backup.permanent} <= present
    if policy.full is not None:
        fulls = [backup for backup in past.backups if not backup.is_delta and not backup.permanent]
        newest = sorted(fulls, key=lambda backup: (past.trust(backup) == 2, backup.finish_time))[-policy.full :]
        intact = [b for b in fulls if set(past.segments(b, b.timeline, b.finish_lsn)) <= set(past.stored_at)]
        if len(intact) == len(fulls):
            assert {backup.name for backup in newest} <= present


@settings(max_examples=250, deadline=None)
@given(pasts(gaps=False), policies())
def test_as_many_full_backups_stay_that_lead_to_the_present(past: Past, policy: RetentionPolicy) -> None:
    """After a restore to the past those that were taken after it, of what was left, replace none from before it."""
    _, _, present, _ = expire(past, policy)
    if policy.full is not None and past.stored_at and len({b.system_identifier for b in past.backups}) == 1:
        last = max((at, timeline) for (timeline, _), at in past.stored_at.items())[1]
        fulls = [b for b in past.backups if not b.is_delta and not b.permanent and past.leads_to(b, last)]
        newest = sorted(fulls, key=lambda backup: backup.finish_time)[-policy.full :]
        assert {backup.name for backup in newest} <= present


@settings(max_examples=300, deadline=None)
@given(pasts(gaps=False), policies())
def test_nothing_stays_that_nobody_needs(past: Past, policy: RetentionPolicy) -> None:
    verdicts, needed, _, wal = expire(past, policy)
    kept = [verdict.backup for verdict in verdicts if verdict.stays]
    begin = past.now - policy.window if policy.window is not None else past.now
    parents = {backup.parent for backup in kept}
    fulls = [backup for backup in past.backups if not backup.is_delta and not backup.permanent]
    for verdict in verdicts:
        backup = verdict.backup
        if not verdict.stays or backup.permanent or backup.name in parents or "nothing else" in verdict.reason:
            continue
        root = next(each for each in past.backups if each.name == (backup.full or backup.name))
        newer = [f for f in fulls if f.finish_time > root.finish_time and f.modified_at > root.modified_at]
        newer = [full for full in newer if past.trust(full) >= past.trust(backup)]
        last = max(((at, timeline) for (timeline, _), at in past.stored_at.items()), default=(begin, 1))[1]
        if past.leads_to(root, last):
            newer = [full for full in newer if past.leads_to(full, last)]
        by_count = policy.full is not None and len(newer) < policy.full
        in_window = max(backup.finish_time, backup.modified_at) > begin
        assert by_count or in_window or is_an_anchor(past, backup, kept, begin), verdict
    if not needed.everything:
        for segment in wal:
            assert is_read(past, verdicts, segment) or segment[0] not in needed.followed, segment


def is_an_anchor(past: Past, backup: Backup, kept: list[Backup], begin: datetime) -> bool:
    """Tell whether on some timeline no other backup stands between `backup` and the window."""
    before = [point for point in past.points if point.time <= begin]
    timelines = {point.timeline for point in past.points if point.time > begin}
    # Which one was current is told by number, or by what was written last and no more since.
    stored = [(at, timeline) for (timeline, _), at in past.stored_at.items() if timeline not in timelines]
    timelines |= {max((point.timeline for point in before), default=1), max(stored, default=(begin, 1))[1]}
    for timeline in timelines:
        rivals = [
            other
            for other in kept
            if other.system_identifier == backup.system_identifier
            and max(other.finish_time, other.modified_at) <= begin
            and past.leads_to(other, timeline)
            and other.finish_lsn > backup.finish_lsn
            and past.trust(other) >= past.trust(backup)
        ]
        if past.leads_to(backup, timeline) and not rivals:
            return True
    return False


def is_read(past: Past, verdicts: list[Verdict], segment: tuple[int, int]) -> bool:
    """Tell whether a recovery from a kept backup could ask for `segment`."""
    kept = [verdict for verdict in verdicts if verdict.stays]
    open_ended = [verdict.backup for verdict in kept if verdict.wal_after] or [verdict.backup for verdict in kept]
    for backup in open_ended:
        for timeline in {1, *past.histories}:
            end = (segment[1] + 1) * SEGMENT_BYTES
            if past.leads_to(backup, timeline) and segment in past.segments(backup, timeline, end):
                return True
    own = ((v.backup, v.backup.timeline, v.backup.finish_lsn) for v in kept)
    return any(segment in past.segments(*each) for each in own)
