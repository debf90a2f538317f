"""Archive and fetch for the hooks. The constants mirror hooks/protocol.h; a test compares them."""

import asyncio
import re
from collections.abc import Awaitable
from functools import partial
from pathlib import Path
from typing import TypeVar

from aiohttp import web

from agent.archive.archiver import WalArchiver
from agent.domain.wal import wal_file_kind
from agent.errors import AgentError, ConfigError, RepositoryCorrupt, RepositoryUnavailable
from agent.fetch.fetcher import WalFetcher
from agent.postgres.data_directory import DataDirectory
from agent.tasks import in_thread

HOOK_PATH_PREFIX = "/v1/wal/"
HEADER_WAL_FILE = "Pitr-Wal-File"  # names the file that a verdict (200, 410) is about
HEADER_DEADLINE = "Pitr-Deadline"  # whole seconds that the hook still waits
HEADER_PLACE = "Pitr-Place"  # DEVICE:INODE:NAME: a directory, and a new name in it that the hook would take
HEADER_FILE = "Pitr-File"  # SIZE:SECONDS.NANOSECONDS of the file handed over to be archived: FileState.seen_elsewhere
STATUS_OK = 200  # archived durably; or: the body is the file
STATUS_PLACED = 201  # the file lies where HEADER_PLACE said
STATUS_ABSENT = 410  # proven not to be in the archive; never a server's own 404
STATUS_RETRY = 503  # not now: ask again
STATUS_WRONG_REQUEST = 400  # a restore is not asked again: the same request would be as wrong
STATUS_DAMAGED = 502  # likewise: what the archive holds is damaged, and stays so

ANSWER_SECONDS = 0.5  # left of the hook's deadline to bring it the answer

_SECONDS = re.compile(r"[0-9]{1,9}")
_PLACE = re.compile(r"([0-9]{1,20}):([0-9]{1,20}):(xlogtemp\.pitr-[0-9]{1,10})")

T = TypeVar("T")


def wal_file_of(request: web.Request) -> str:
    """Return the WAL file that a request is about; raise `ConfigError` for whatever is no name of one.

    With the name in `HEADER_PLACE`, which has a grammar as strict, it is all of a request that becomes part of a path.
    """
    name = request.match_info["name"]
    if wal_file_kind(name) is None:
        raise ConfigError(
            f"{name!r} is not the name of a WAL file",
            hint="Call the hooks as wal-archive.sh %p %f and wal-restore.sh %f %p.",
        )
    return name


class HookApi:
    """The routes that the hooks call. `archiver` is None where there is nothing to archive (restore mode)."""

    def __init__(
        self,
        archiver: WalArchiver | None,
        fetcher: WalFetcher,
        data_directory: DataDirectory,
        request_timeout: float,
    ) -> None:
        self._archiver = archiver
        self._fetcher = fetcher
        self._data_directory = data_directory
        self._request_timeout = request_timeout

    def routes(self) -> list[web.RouteDef]:
        """Return the routes to add to the application on the socket."""
        return [
            web.post(HOOK_PATH_PREFIX + "{name}", self.archive),
            web.get(HOOK_PATH_PREFIX + "{name}", self.fetch, allow_head=False),
        ]

    async def archive(self, request: web.Request) -> web.Response:
        """Answer 200 once the named file of pg_wal is durable in the repository.

        Whoever does not tell which file is meant (curl, a hook of before) gets the answer for the agent's own.
        """
        name = wal_file_of(request)
        if self._archiver is None:
            raise ConfigError("this agent restores; it does not archive", hint="Archive through the primary's agent.")
        await self._in_time(request, self._archiver.archive(name, handed_over=request.headers.get(HEADER_FILE)))
        return web.Response(status=STATUS_OK, headers={HEADER_WAL_FILE: name})

    async def fetch(self, request: web.Request) -> web.StreamResponse:
        """Answer 201 with the file in the place that was offered, 200 with its content, or 410 if it is proven absent.

        A place is taken up only if it is in this agent's own pg_wal: the hook's mount may be another. Every failure but
        a damaged object invites the hook to ask again: recovery is worth waiting until somebody has mended a
        permission, or the data volume.
        """
        name = wal_file_of(request)
        try:
            return await self._fetch(request, name)
        except RepositoryCorrupt:
            raise
        except AgentError as error:
            raise RepositoryUnavailable(error.message, hint=error.hint) from error

    async def _fetch(self, request: web.Request, name: str) -> web.StreamResponse:
        headers = {HEADER_WAL_FILE: name}
        offered = request.headers.get(HEADER_PLACE, "") if await self._fetcher.can_place(name) else ""
        identifier, place = await in_thread(self._look, offered)
        if place is not None:
            if await self._in_time(request, self._fetcher.place(name, place, identifier)):
                if request.transport is None or request.transport.is_closing():  # the hook was killed: nobody takes it
                    await in_thread(partial(place.unlink, missing_ok=True))
                return web.Response(status=STATUS_PLACED, headers=headers)
        elif (answer := await self._in_time(request, self._send(request, name, identifier))) is not None:
            return answer
        text = f'WAL file "{name}" is not in the archive\n'
        return web.Response(status=STATUS_ABSENT, headers=headers, text=text)

    async def _send(self, request: web.Request, name: str, identifier: int) -> web.StreamResponse | None:
        """Send the file, or return None if it is proven absent.

        What fails after the head was sent breaks the connection: the hook throws away what is not whole and asks again.
        """
        async with self._fetcher.open(name, identifier) as file:
            if file is None:
                return None
            answer = web.StreamResponse(headers={HEADER_WAL_FILE: name})
            answer.content_length = file.size
            await answer.prepare(request)
            try:
                async for piece in file.pieces:
                    await answer.write(piece)
                await answer.write_eof()
            except BaseException:
                if request.transport is not None:
                    request.transport.abort()
                raise
        return answer

    def _look(self, offered: str) -> tuple[int, Path | None]:
        """Return the database cluster's identifier, and the offered place if it is in pg_wal."""
        identifier = self._data_directory.control_file().system_identifier
        place = _PLACE.fullmatch(offered)
        if place is None:
            return identifier, None
        pg_wal = self._data_directory.wal_directory()
        is_here = pg_wal.identity == (int(place[1]), int(place[2]))
        return identifier, pg_wal.path / place[3] if is_here else None

    async def _in_time(self, request: web.Request, work: Awaitable[T]) -> T:
        text = request.headers.get(HEADER_DEADLINE, "")
        patience = float(text) if _SECONDS.fullmatch(text) else self._request_timeout
        try:
            async with asyncio.timeout(max(ANSWER_SECONDS, min(patience, self._request_timeout) - ANSWER_SECONDS)):
                return await work
        except TimeoutError:
            raise RepositoryUnavailable(
                f"the repository did not answer within {patience:.0f} s",
                hint="The agent goes on trying; its log and metrics say why.",
            ) from None
