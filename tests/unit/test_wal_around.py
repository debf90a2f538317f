"""The segments that are read show what reading all of the archive shows; and what is shown is what matters most."""

from contextlib import suppress
from datetime import UTC, datetime, timedelta

from hypothesis import given, settings
from hypothesis.strategies import DataObject, binary, booleans, data, integers, lists, sampled_from, tuples

from agent.domain.archived_path import ArchivedPath
from agent.domain.file_node import FileNode
from agent.domain.transactions import EndedTransaction, Mark, TransactionReader
from agent.domain.wal import MAGIC_BY_MAJOR
from agent.domain.wal_around import Around, Nearest, segments_around
from agent.domain.wal_records import RECORD_HEADER
from agent.domain.wal_search import last_transaction
from agent.domain.wal_walk import WalWalk
from agent.domain.window import latest_timeline
from agent.repository.relation_sizes import sizes_in
from tests.support.wal_world import BEGIN, World, worlds

NOW = datetime(2026, 11, 22, 14, 30, tzinfo=UTC)


def read(world: World, names: "list[str]") -> list[EndedTransaction]:
    walk, found = WalWalk(), []
    reader: TransactionReader | None = None
    for name in names:
        for lsn, record in walk.take(world.archived[name]):
            reader = reader or TransactionReader(walk.magic)
            ended = reader.take(lsn, record)
            if ended is not None:
                found.append(ended)
    return found


@settings(max_examples=100, deadline=None)
@given(data())
def test_a_stretch_of_time_is_read_from_as_few_segments_as_show_it(drawn: DataObject) -> None:
    world, at = drawn.draw(worlds()), drawn.draw(integers(-20_000, 300_000))
    before, after = drawn.draw(integers(0, 40_000)), drawn.draw(integers(0, 40_000))
    moment = BEGIN + timedelta(milliseconds=at)
    around = Around(moment, moment - timedelta(milliseconds=before), moment + timedelta(milliseconds=after))
    path = ArchivedPath(world.holdings(), latest_timeline(world.holdings()))
    span = world.follow(segments_around(path, around, 1000))
    lasts = [(run, world.follow(last_transaction(run)).end) for run in path.runs]
    run = next((run for run, last in lasts if last is not None and last.time >= around.begin), None)
    if run is None or span is None:
        assert run is None
        assert span is None
        return
    everything = read(world, list(run.segments))
    assert set(span.names) <= set(run.segments)
    wanted = [each.xid for each in everything if around.holds(each.time)]
    assert [each.xid for each in read(world, list(span.names)) if around.holds(each.time)] == wanted
    cut = world.follow(segments_around(path, around, 2))
    assert cut is not None
    assert len(cut.names) <= 2
    assert cut.is_cut == (len(span.names) > 2)


def transaction(xid: int, time: datetime, *, drops: bool = False) -> EndedTransaction:
    return EndedTransaction(
        xid=xid, time=time, lsn=xid * 100, commits=True, first_lsn=xid * 100, records=1, wal_bytes=34,
        subtransactions=0, rows={}, created=frozenset(), filled=frozenset(),
        dropped=(FileNode(1663, 5, 20000),) if drops else (), dropped_databases=(), truncates=False,
    )  # fmt: skip


@given(lists(tuples(integers(-100, 100), booleans()), max_size=60), integers(1, 5))
def test_marked_transactions_are_kept_before_near_ones(events: list[tuple[int, bool]], most: int) -> None:
    around = Around(NOW, NOW - timedelta(seconds=60), NOW + timedelta(seconds=60))
    nearest = Nearest(around, most)
    history = [
        transaction(xid, NOW + timedelta(seconds=seconds), drops=drops)
        for xid, (seconds, drops) in enumerate(sorted(events), 1)
    ]
    for each in history:
        nearest.add(each)
    inside = [each for each in history if around.holds(each.time)]
    kept = nearest.kept()
    assert len(kept) == min(most, len(inside))
    assert nearest.left_out == len(inside) - len(kept)
    assert kept == sorted(kept, key=lambda each: each.lsn)
    marked = [each for each in inside if each.marks == (Mark.DROP,)]
    assert sum(1 for each in kept if each.marks) == min(most, len(marked))
    assert nearest.before == next((each for each in reversed(history) if each.time < around.begin), None)
    assert nearest.after == next((each for each in history if each.time > around.end), None)


def test_the_parts_of_a_relation_are_added_up_and_its_other_forks_left_out() -> None:
    lines = [
        b'{ "Path": "base/5/16390", "Size": 1073741824, "Last-Modified": "x" },\n',
        b'{ "Path": "base/5/16390.1", "Size": 8192, "Last-Modified": "x" },\n',
        b'{ "Path": "base/5/16390_fsm", "Size": 24576, "Last-Modified": "x" },\n',
        b'{ "Path": "base/4/16390", "Size": 1, "Last-Modified": "x" },\n',
        b'{ "Path": "pg_tblspc/17000/PG_15_202209061/5/16391", "Size": 8192, "Last-Modified": "x" },\n',
        b'{ "Path": "global/1262", "Size": 8192, "Last-Modified": "x" }\n',
    ]
    files = [FileNode(1663, 5, 16390), FileNode(17000, 5, 16391), FileNode(1664, 0, 1262), FileNode(1663, 5, 9)]
    assert sizes_in(lines, files) == {files[0]: 1073741824 + 8192, files[1]: 8192, files[2]: 8192}


@given(binary(max_size=120), sampled_from(sorted(MAGIC_BY_MAJOR.values())), integers(0, 11), integers(0, 255))
def test_a_record_of_any_bytes_is_read_or_refused(tail: bytes, magic: int, manager: int, info: int) -> None:
    record = RECORD_HEADER.pack(RECORD_HEADER.size + len(tail), 700, 0, info, manager, 0) + tail
    with suppress(ValueError):
        TransactionReader(magic).take(100, record)
