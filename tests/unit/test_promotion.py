"""What a promoted server says of its recovery decides whether it is called restored."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from agent.domain.restore_target import RestoreTarget, TargetKind
from agent.postgres.postmaster import Recovery
from agent.restore.marker import MarkerStage, RestoreMarker
from agent.restore.promotion import failure_of

MOMENT = datetime(2026, 11, 22, 12, tzinfo=UTC)
SEGMENT_BYTES = 1 << 24
MARKER = RestoreMarker(
    request={},
    stage=MarkerStage.REPLAYING,
    backup="base_000000010000000000000001",
    timeline=1,
    target="",
    first_segment="000000010000000000000001",
    last_segment="000000010000000000000003",
    to_the_end=False,
    started_at=MOMENT,
)
RECOVERY = Recovery(
    new_timeline=2,
    stopped=None,
    redo_done_lsn=0x3000028,
    restored_lsn=4 * SEGMENT_BYTES,
    last_commit_at=MOMENT,
    prepared_transactions=0,
)


@pytest.mark.parametrize("kind", [TargetKind.TIME, TargetKind.END_OF_WAL])
def test_a_recovery_that_came_where_the_plan_leads_is_no_failure(kind: TargetKind) -> None:
    target = RestoreTarget(kind, time=MOMENT if kind is TargetKind.TIME else None)
    assert failure_of(MARKER, RECOVERY, SEGMENT_BYTES, target) is None
    assert failure_of(MARKER, replace(RECOVERY, last_commit_at=None), SEGMENT_BYTES, target) is None


def test_a_transaction_after_the_target_time_is_a_failure() -> None:
    beyond = replace(RECOVERY, last_commit_at=MOMENT + timedelta(microseconds=1))
    failure = failure_of(MARKER, beyond, SEGMENT_BYTES, RestoreTarget(TargetKind.TIME, time=MOMENT))
    assert failure is not None
    assert "a transaction of 2026-11-22T12:00:00.000001Z was replayed, which is after the time" in failure


def test_a_replay_without_target_that_ends_before_the_last_segment_is_a_failure() -> None:
    short = replace(RECOVERY, restored_lsn=3 * SEGMENT_BYTES)
    failure = failure_of(replace(MARKER, to_the_end=True), short, SEGMENT_BYTES, RestoreTarget())
    assert failure is not None
    assert "WAL is archived up to 000000010000000000000003" in failure
