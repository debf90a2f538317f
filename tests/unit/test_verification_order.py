"""What is read back next: everything has its turn, and nothing is read twice within a week."""

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis.strategies import datetimes, integers, lists, sampled_from, text, timedeltas, timezones

from agent.domain.verification_order import AGAIN_AFTER, VerificationRecord, in_turn, wal_shares
from tests.support.retention_world import Past, pasts

NOW = datetime(2026, 11, 23, tzinfo=UTC)
moments = datetimes(NOW.replace(year=2020, tzinfo=None), NOW.replace(tzinfo=None), timezones=timezones())


@given(pasts(), lists(integers(0, 1 << 16), unique=True))
def test_every_wal_file_belongs_to_one_base_backup(past: Past, numbers: list[int]) -> None:
    names = sorted(f"{1 + number % 3:08X}{number // 256:08X}{number % 256:08X}" for number in numbers)
    shares = wal_shares(past.backups, names)
    assert set(shares) == {backup.name for backup in past.backups}
    assert sorted(name for share in shares.values() for name in share) == (names if past.backups else [])
    for backup in past.backups:
        later = [other.start_segment for other in past.backups if other.start_segment > backup.start_segment]
        assert all(name < min(later) for name in shares[backup.name] if later)


@given(pasts(), lists(moments, min_size=1))
def test_who_was_never_verified_comes_first_and_the_least_recent_next(past: Past, times: list[datetime]) -> None:
    records = {
        backup.name: VerificationRecord(verified_at=times[index % len(times)] if index % 3 else None)
        for index, backup in enumerate(past.backups)
    }
    order = [records[backup.name].verified_at for backup in in_turn(past.backups, records)]
    known = [moment for moment in order if moment is not None]
    assert order == [None] * (len(order) - len(known)) + sorted(known)


@given(timedeltas(timedelta(), 3 * AGAIN_AFTER), lists(text(max_size=3), max_size=3), sampled_from([1, 1 << 40]))
def test_a_pass_goes_on_until_it_has_ended_and_begins_anew_after_a_week(
    passed: timedelta, problems: list[str], size: int
) -> None:
    begun = VerificationRecord().read(size, problems, NOW)
    assert begun.resumed(NOW + passed) == begun
    assert begun.known_problems == tuple(dict.fromkeys(problems))
    ended = begun.ended(NOW)
    assert (ended.verified_at, ended.bytes_on(NOW)) == (NOW, size)
    later = ended.resumed(NOW + passed)
    assert later.is_complete == (passed < AGAIN_AFTER)
    assert later.verified_at == NOW, "what was verified stays so until the next pass has ended"
    assert later.known_problems == ended.problems
    assert later.read(0, [], NOW + passed).ended(NOW + passed).known_problems == (
        ended.problems if later.is_complete else ()
    )
