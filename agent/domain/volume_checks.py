"""Rules of `pitr check` about the data volume, the socket, and whose repository this is."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from agent.domain.checks import Finding, Seen, failed, failed_with, passed, skipped, warned
from agent.errors import AgentError, AgentUnavailable, ConfigError, WalRefused

_FEW_SEGMENTS = 64


@dataclass(frozen=True, slots=True)
class VolumeFacts:
    """What is seen of PGDATA from here.

    wal_is_ours: pg_wal belongs to the agent's own user, who may write to it. wal_free_bytes: on its volume.
    """

    path: str
    system_identifier: int
    segment_bytes: int
    wal_is_ours: bool
    wal_free_bytes: int


@dataclass(frozen=True, slots=True)
class SocketFacts:
    """The directory of the agent's socket: everybody who sees it may replace what is in it; it is a volume of its own.

    What Kubernetes mounts (emptyDir) is open to all, and seen only by the containers that mount it.
    """

    directory: str
    is_open_to_all: bool
    is_volume: bool


@dataclass(frozen=True, slots=True)
class RunningAgent:
    """What the agent on the socket says of itself. `wrong`: what it finds wrong, each with what to do."""

    version: str
    started_at: datetime
    backlog_files: int
    wrong: tuple[tuple[str, str], ...]


def volume_findings(volume: Seen[VolumeFacts], server_identifier: int | None) -> Iterator[Finding]:
    """Say whether base backups can be read from PGDATA; `server_identifier` is that of the server, if it is known."""
    if isinstance(volume, AgentError):
        yield failed_with("PGDATA", volume)
        return
    if server_identifier is None:
        yield skipped("PGDATA", f"{volume.path} is readable; whether it is the server's was not told")
    elif server_identifier != volume.system_identifier:
        text = f"{volume.path} is database cluster {volume.system_identifier}, the server is {server_identifier}"
        yield failed("PGDATA", text, "Correct PGDATA, or PGHOST and PGPORT.", ConfigError)
    else:
        yield passed("PGDATA", f"{volume.path} is readable, and the server's")
    yield _pg_wal(volume)
    yield _space(volume)


def _pg_wal(volume: VolumeFacts) -> Finding:
    if volume.wal_is_ours:
        return passed("pg_wal", "fetched WAL can be put into place without a copy")
    fix = "Run the agent as the user that owns PGDATA (runAsUser)."
    return warned("pg_wal", "another user's: fetched WAL goes over the socket, which is slower", fix)


def _space(volume: VolumeFacts) -> Finding:
    segments = volume.wal_free_bytes // volume.segment_bytes
    text = f"{volume.wal_free_bytes / (1 << 30):.1f} GiB free, {segments} WAL segments"
    if segments < _FEW_SEGMENTS:
        return warned("space", text, "Enlarge the volume: an outage of the store fills it, and PostgreSQL stops.")
    return passed("space", text)


def hook_finding(hook: str | None, *, is_seen: bool) -> Finding:
    """Say whether the program is there that archive_command calls; `hook` is None if that is not the hook."""
    if hook is None:
        return skipped("hook", "archive_command does not call it")
    if is_seen:
        return passed("hook", f"{hook} is a program")
    return skipped("hook", f"{hook} is not in this container; PostgreSQL's was not looked into")


def socket_finding(facts: Seen[SocketFacts]) -> Finding:
    """Say whether the directory of the socket is fit for it."""
    if isinstance(facts, AgentError):
        return failed_with("socket", facts)
    if facts.is_volume:
        return passed("socket", f"{facts.directory} is a volume of its own, for those who mount it")
    if facts.is_open_to_all:
        text = f"{facts.directory} can be written by everybody, who could put another socket there"
        return warned("socket", text, f"chmod o-w {facts.directory}")
    return passed("socket", f"{facts.directory} is closed to others")


def agent_findings(running: Seen[RunningAgent]) -> Iterator[Finding]:
    """Say whether an agent runs, from what it answered, and pass on what it finds wrong."""
    if isinstance(running, AgentUnavailable):
        fix = "Start it (pitr agent), and read its log; PITR_SOCKET has to be the same here, there and for PostgreSQL."
        yield failed("agent", running.message, fix, AgentUnavailable)
    elif isinstance(running, AgentError):
        yield failed_with("agent", running)
    else:
        since = f"{running.started_at:%Y-%m-%d %H:%M:%S} UTC"
        yield passed("agent", f"{running.version}, since {since}; {running.backlog_files} WAL files wait")
        for text, what_to_do in running.wrong:
            yield warned("agent's word", text, what_to_do)


def identity_finding(owner: Seen[int | None], ours: int | None) -> Finding:
    """Say whether the repository is this database cluster's: `owner` is whose it is, None if it is empty."""
    if isinstance(owner, AgentError):
        return failed_with("identity", owner)
    if owner is None:
        return passed("identity", "empty: it will belong to the first database cluster that archives to it")
    if ours is None:
        return skipped("identity", f"it belongs to database cluster {owner}; which this one is was not told")
    if owner != ours:
        text = f"it belongs to database cluster {owner}, this one is {ours}"
        return failed("identity", text, "Give this cluster a prefix of its own (WALG_S3_PREFIX).", WalRefused)
    return passed("identity", f"it belongs to this database cluster, {ours}")


def key_finding(problem: AgentError | None, *, encrypts: bool, compression: str) -> Finding:
    """Say whether the encryption key is that of what is stored; `problem` is what looking at it ended in."""
    if problem is not None:
        return failed_with("encryption", problem)
    how = "with libsodium, by a key that fits" if encrypts else "none, as of all that is stored"
    return passed("encryption", f"{how}; compression {compression}, any is read")
