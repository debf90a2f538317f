"""Follows one WAL segment from PostgreSQL into the repository: the proof that archiving works, with its seconds."""

from agent.domain.checks import Finding, failed, failed_with, passed
from agent.errors import AgentError, WalNotArchived
from agent.ports import Clock, ObjectStore
from agent.postgres.connection import PostgresServer
from agent.postgres.server_facts import ArchiverState
from agent.repository.keys import WAL_FOLDER
from agent.repository.wal_archive import parse_wal_object

_POLL_SECONDS = 0.25
_SUBJECT = "WAL switch"


async def follow_segment(
    postgres: PostgresServer, store: ObjectStore, clock: Clock, *, patience: float, drain_timeout: float
) -> Finding:
    """Have PostgreSQL end a segment, wait up to `patience` seconds for it in the repository; say what came of it.

    Tells also for how many segments like it, one after the other, an agent that is told to end has the time:
    `drain_timeout` seconds.
    """
    try:
        name = await postgres.finish_segment()
        began = clock.monotonic()
        while True:
            archiver = await postgres.archiver()  # asked first: what it takes for archived has to be there
            if await _is_stored(store, name):
                seconds = clock.monotonic() - began
                more = f"time for {drain_timeout / max(seconds, _POLL_SECONDS):.0f} like it in PITR_DRAIN_TIMEOUT"
                return passed(_SUBJECT, f"{name} was in the repository after {seconds:.1f} s: {more}")
            if archiver.last_archived[:24] >= name or clock.monotonic() - began > patience:
                return _missing(name, archiver, clock.monotonic() - began)
            await clock.sleep(_POLL_SECONDS)
    except AgentError as error:
        return failed_with(_SUBJECT, error)


async def _is_stored(store: ObjectStore, name: str) -> bool:
    async for info in store.list(WAL_FOLDER + name):
        stored = parse_wal_object(info)
        if stored is not None and stored.name == name:
            return True
    return False


def _missing(name: str, archiver: ArchiverState, seconds: float) -> Finding:
    if archiver.last_archived[:24] >= name:
        text = f"PostgreSQL takes {name} for archived, and it is not in this repository"
        fix = "Correct archive_command, or give pitr the agent's settings. Then take a base backup: WAL is missing."
    else:
        text = f"{name} was not in the repository after {seconds:.0f} s"
        if archiver.last_failed:
            text += f"; archiving has failed {archiver.failures} times, last for {archiver.last_failed}"
        fix = "PostgreSQL's log has what the hook said, and the agent's log why."
    return failed(_SUBJECT, text, fix, WalNotArchived)
