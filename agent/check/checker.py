"""Collects what `pitr check` looks at, all at once and each with a deadline, and has the rules judge it."""

import asyncio
import os
import stat
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

from agent.check.store_trials import TRIAL_SECONDS, StoreTrials
from agent.check.wal_switch import follow_segment
from agent.domain.checks import Finding, Section, Seen, failed_with, passed, skipped
from agent.domain.server_checks import ServerFacts, hook_of, role_finding, setting_findings
from agent.domain.store_checks import BucketFacts, Operation, StoreFacts, bucket_findings, store_findings
from agent.domain.volume_checks import (
    RunningAgent,
    SocketFacts,
    VolumeFacts,
    agent_findings,
    hook_finding,
    identity_finding,
    key_finding,
    socket_finding,
    volume_findings,
)
from agent.errors import AgentError, AgentUnavailable, ConfigError, PostgresError, RepositoryUnavailable
from agent.ports import Clock, ObjectStore
from agent.postgres.connection import PostgresServer
from agent.postgres.data_directory import DataDirectory
from agent.repository.key_check import refuse_other_key
from agent.repository.object_format import ObjectFormat
from agent.repository.owner import repository_owner
from agent.repository.wal_archive import WalArchive
from agent.settings import Settings
from agent.tasks import in_thread, task_group

T = TypeVar("T")
_LOOK_SECONDS = 30.0
_ABOVE = "not looked at, because of what failed above"


@dataclass(frozen=True, slots=True)
class Repository:
    """The repository as the settings name it. `examine`: looks at what only a bucket has; None for a directory."""

    store: ObjectStore
    objects: ObjectFormat
    archive: WalArchive
    examine: Callable[[], Awaitable[BucketFacts]] | None


@dataclass(frozen=True, slots=True)
class _Seen:
    """All that was looked at. `owner`, `key` and `bucket` are None where there was nothing to look at."""

    server: Seen[ServerFacts]
    volume: Seen[VolumeFacts]
    socket: Seen[SocketFacts]
    agent: Seen[RunningAgent]
    trials: Seen[StoreFacts]
    bucket: Seen[BucketFacts] | None
    owner: Seen[int | None]
    key: Seen[None]

    @property
    def system_identifier(self) -> int | None:
        """Of this database cluster, from the server or from PGDATA."""
        known = (each.system_identifier for each in (self.server, self.volume) if not isinstance(each, AgentError))
        return next(known, None)

    @property
    def is_store_readable(self) -> bool:
        return not isinstance(self.trials, AgentError) and self.trials.trials[Operation.LIST].problem is None


class Checker:
    """Looks at PostgreSQL, the volume, the agent and the repository of `settings`."""

    def __init__(
        self,
        settings: Settings,
        repository: Seen[Repository],
        postgres: PostgresServer,
        ask_agent: Callable[[], Awaitable[RunningAgent]],
        clock: Clock,
    ) -> None:
        """`repository` may be why it cannot be opened; `ask_agent` raises `AgentUnavailable` if none answers."""
        self._settings = settings
        self._repository = repository
        self._postgres = postgres
        self._ask_agent = ask_agent
        self._clock = clock

    async def run(self, switch_patience: float | None) -> list[Section]:
        """Return what is to be said, in sections.

        A WAL segment is ended and waited for in the repository up to `switch_patience` seconds; None: it is not.
        """
        seen = await self._look_at_all()
        sections = [
            Section("PostgreSQL", tuple(self._server(seen.server))),
            Section("Volume and agent", tuple(self._beside(seen))),
            Section("Store", tuple(self._store(seen))),
            Section("Repository", tuple(self._identity(seen))),
        ]
        return [*sections, Section("End to end", (await self._switch(seen, switch_patience),))]

    async def _look_at_all(self) -> _Seen:
        repository = self._repository
        async with task_group() as group:

            def look(
                name: str, work: Awaitable[T], late: type[AgentError], seconds: float = _LOOK_SECONDS
            ) -> asyncio.Task[Seen[T]]:
                return group.create_task(_in_time(name, work, late, seconds), name=f"look at {name}")

            server = look("PostgreSQL", self._postgres.facts(), PostgresError)
            volume = look("PGDATA", in_thread(self._look_at_volume), ConfigError)
            socket = look("the socket", in_thread(_look_at_socket, self._settings.socket), ConfigError)
            agent = look("the agent", self._ask_agent(), AgentUnavailable)
            trials: asyncio.Task[Seen[StoreFacts]]
            bucket: asyncio.Task[Seen[BucketFacts]] | None = None
            owner: asyncio.Task[Seen[int | None]]
            key: asyncio.Task[Seen[None]]
            if isinstance(repository, AgentError):
                gone: asyncio.Task[AgentError] = look("the repository", _raise(repository), RepositoryUnavailable)
                trials = owner = key = gone
            else:
                late = RepositoryUnavailable
                all_trials = len(Operation) * TRIAL_SECONDS  # each has its own deadline
                trials = look("the store", StoreTrials(repository.store, self._clock).run(), late, all_trials)
                if repository.examine is not None:
                    bucket = look("the bucket", repository.examine(), late)
                owner = look("the repository's owner", repository_owner(repository.store, repository.archive), late)
                key = look("the encryption", refuse_other_key(repository.store, repository.objects), late)
        return _Seen(
            server.result(), volume.result(), socket.result(), agent.result(), trials.result(),
            bucket.result() if bucket is not None else None, owner.result(), key.result(),
        )  # fmt: skip

    def _look_at_volume(self) -> VolumeFacts:
        directory = DataDirectory(self._settings.require_data_directory())
        control = directory.control_file()
        wal = directory.wal_directory().path
        return VolumeFacts(
            path=str(directory.path),
            system_identifier=control.system_identifier,
            segment_bytes=control.wal_segment_bytes,
            wal_is_ours=wal.stat().st_uid == os.geteuid() and os.access(wal, os.W_OK),
            wal_free_bytes=directory.wal_volume_free_bytes(),
        )

    def _server(self, server: Seen[ServerFacts]) -> Iterator[Finding]:
        if isinstance(server, AgentError):
            yield failed_with("connection", server)
            yield skipped("settings, role", _ABOVE)
            return
        kind = "a standby" if server.in_recovery else "a primary"
        postgres = self._settings.postgres
        yield passed("connection", f"{kind} answers at {postgres.host}, port {postgres.port}")
        hook = str(self._settings.hook_directory / "wal-archive.sh")
        uses_deltas = self._settings.deltas.max_steps > 0
        yield from setting_findings(server, hook=hook, uses_deltas=uses_deltas, today=self._clock.now().date())
        yield role_finding(server)

    def _beside(self, seen: _Seen) -> Iterator[Finding]:
        server = None if isinstance(seen.server, AgentError) else seen.server
        yield from volume_findings(seen.volume, server.system_identifier if server is not None else None)
        if server is not None:
            hook = hook_of(server.settings.get("archive_command", ""))
            yield hook_finding(hook, is_seen=hook is not None and os.access(hook, os.X_OK))
        yield socket_finding(seen.socket)
        yield from agent_findings(seen.agent)

    def _store(self, seen: _Seen) -> Iterator[Finding]:
        if isinstance(seen.trials, AgentError):
            yield failed_with("store", seen.trials)
            return
        yield from store_findings(seen.trials)
        if seen.bucket is None:
            return
        if not seen.is_store_readable:
            yield skipped("bucket", _ABOVE)
            return
        retention = self._settings.retention
        yield from bucket_findings(
            seen.bucket,
            is_writable=seen.trials.trials[Operation.PUT].problem is None,
            keeps=retention.window if retention is not None else None,
        )

    def _identity(self, seen: _Seen) -> Iterator[Finding]:
        if not seen.is_store_readable:
            yield skipped("identity, encryption", _ABOVE)
            return
        yield identity_finding(seen.owner, seen.system_identifier)
        yield key_finding(
            seen.key,
            encrypts=self._settings.libsodium_key is not None,
            compression=self._settings.compression,
        )

    async def _switch(self, seen: _Seen, patience: float | None) -> Finding:
        reason = _no_switch(seen) if patience is not None else "left out, as asked"
        if reason is not None or patience is None or isinstance(self._repository, AgentError):
            return skipped("WAL switch", reason or _ABOVE)
        return await follow_segment(
            self._postgres,
            self._repository.store,
            self._clock,
            patience=patience,
            drain_timeout=self._settings.drain_timeout,
        )


def _no_switch(seen: _Seen) -> str | None:
    """Return why no WAL switch can be followed into the repository, None if it can."""
    server = seen.server
    if isinstance(server, AgentError) or not seen.is_store_readable:
        return _ABOVE
    if server.in_recovery:
        return "a standby cannot switch WAL; check the primary"
    if server.settings.get("archive_mode") == "off":
        return "archive_mode is off"
    if not (server.is_superuser or server.may_execute.get("pg_switch_wal()")):
        return f"role {server.role} may not switch WAL"
    if isinstance(seen.agent, AgentError):
        return "no agent runs here"
    return None


async def _raise(error: AgentError) -> NoReturn:
    raise error


async def _in_time(name: str, work: Awaitable[T], late: type[AgentError], seconds: float) -> Seen[T]:
    """Return what `work` returns, or the error it ends in; after `seconds` that is `late`: nothing was seen."""
    try:
        async with asyncio.timeout(seconds):
            return await work
    except AgentError as error:
        return error
    except TimeoutError:
        return late(f"{name} could not be looked at within {seconds:.0f} s", hint="Try again when it is quiet.")


def _look_at_socket(socket: Path) -> SocketFacts:
    try:
        mode = socket.parent.stat().st_mode
    except OSError as error:
        raise ConfigError(
            f"{socket.parent} cannot be seen: {error.strerror}",
            hint="Share the socket's directory with this container, or correct PITR_SOCKET.",
        ) from error
    is_open_to_all = bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX
    return SocketFacts(str(socket.parent), is_open_to_all, os.path.ismount(socket.parent))
