"""Asks a server of PostgreSQL 17 or later which blocks changed, by its WAL summaries."""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, LiteralString

from agent.domain.lsn import format_lsn, parse_lsn
from agent.domain.timeline import Stretch
from agent.ports import NoSummaries
from agent.tasks import in_thread

if TYPE_CHECKING:
    import psycopg
    from psycopg.rows import TupleRow

    from agent.domain.wal_summaries import ChangedBlocks, WalSummary

_POLL_SECONDS = 0.25
_STALLED_SECONDS = 60.0  # as long as PostgreSQL's own incremental backup waits for a summarizer that gets nowhere
SUMMARIES_SECONDS = 1800.0
"""How long waiting for them and reading them may take in all."""

_IS_ON = "SELECT current_setting('summarize_wal', true) = 'on'"
_STATE = "SELECT summarized_lsn::text, pending_lsn::text FROM pg_get_wal_summarizer_state()"
_AVAILABLE = "SELECT tli, start_lsn::text, end_lsn::text FROM pg_available_wal_summaries()"
# A row for each gigabyte of a relation, so that none is large.
_CONTENTS = """
    SELECT reltablespace, reldatabase, relfilenode, is_limit_block, min(relblocknumber),
           string_agg(int8send(relblocknumber), ''::bytea)
    FROM unnest(%s::bigint[], %s::text[], %s::text[]) AS summary (tli, first, last),
         LATERAL pg_wal_summary_contents(summary.tli, summary.first::pg_lsn, summary.last::pg_lsn)
    WHERE relforknumber = 0
    GROUP BY reltablespace, reldatabase, relfilenode, is_limit_block, relblocknumber >> 17
"""


async def read_changed_blocks(
    connection: "psycopg.AsyncConnection[TupleRow]", path: Sequence[Stretch], start_lsn: int, end_lsn: int
) -> "ChangedBlocks | NoSummaries":
    """Return which blocks the WAL on `path` from `start_lsn` up to `end_lsn` changed.

    A summarizer that is behind is waited for as long as it gets on. Raises psycopg's errors.
    """
    if connection.info.server_version < 170000:
        return NoSummaries("PostgreSQL has WAL summaries from version 17 on")
    if not (await _rows(connection, _IS_ON))[0][0]:
        return NoSummaries("summarize_wal is off")
    if not await _summarized(connection, end_lsn):
        return NoSummaries(f"the WAL summarizer does not get to {format_lsn(end_lsn)}")
    needed = await in_thread(_needed, await _rows(connection, _AVAILABLE), path, start_lsn, end_lsn)
    if needed is None:
        return NoSummaries(f"the WAL summaries do not go back to {format_lsn(start_lsn)} without a gap")
    return await _contents(connection, needed)


async def _summarized(connection: "psycopg.AsyncConnection[TupleRow]", end_lsn: int) -> bool:
    loop = asyncio.get_running_loop()
    position, patience_ends = "", loop.time() + _STALLED_SECONDS
    while True:
        (summarized, pending), *_ = await _rows(connection, _STATE)
        if parse_lsn(summarized) >= end_lsn:
            return True
        if pending != position:
            position, patience_ends = pending, loop.time() + _STALLED_SECONDS
        elif loop.time() > patience_ends:
            return False
        await asyncio.sleep(_POLL_SECONDS)


def _needed(
    rows: "Sequence[TupleRow]", path: Sequence[Stretch], start_lsn: int, end_lsn: int
) -> "list[WalSummary] | None":
    from agent.domain.wal_summaries import WalSummary, covering  # numpy: a tenth of a second and 15 MiB

    available = [WalSummary(timeline, parse_lsn(first), parse_lsn(last)) for timeline, first, last in rows]
    return covering(available, path, start_lsn, end_lsn)


async def _contents(
    connection: "psycopg.AsyncConnection[TupleRow]", summaries: "Sequence[WalSummary]"
) -> "ChangedBlocks | NoSummaries":
    from agent.domain.wal_summaries import ChangedBlocks

    result = ChangedBlocks()
    parameters = [
        [summary.timeline for summary in summaries],
        [format_lsn(summary.start_lsn) for summary in summaries],
        [format_lsn(summary.end_lsn) for summary in summaries],
    ]
    async with connection.cursor(binary=True) as cursor:
        async for tablespace, database, relation, is_limit, lowest, blocks in cursor.stream(_CONTENTS, parameters):
            if is_limit:
                result.add_limit(tablespace, database, relation, lowest)
            elif not result.add(tablespace, database, relation, blocks):
                return NoSummaries("more blocks changed than are remembered")
    await in_thread(result.seal)
    return result


async def _rows(connection: "psycopg.AsyncConnection[TupleRow]", query: LiteralString) -> "list[TupleRow]":
    return await (await connection.execute(query)).fetchall()
