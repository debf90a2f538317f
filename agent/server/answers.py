"""What all requests have in common: who may ask, and how errors are told."""

import socket
import struct
import time
from collections.abc import Callable

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from agent.errors import (
    AgentError,
    ConfigError,
    PostgresError,
    RepositoryError,
    RepositoryUnavailable,
    WalConflict,
    WalRefused,
    library_missing,
)
from agent.telemetry.news import News

_REMIND_SECONDS = 60.0

log = structlog.get_logger()
_UCRED = struct.Struct("3i")  # struct ucred: pid, uid, gid. Source: unix(7), SO_PEERCRED


def status_of(error: AgentError) -> int:
    """Return the HTTP status that tells this error. 503 alone invites the hook to ask again."""
    match error:
        case RepositoryUnavailable():
            return 503
        case RepositoryError() | PostgresError():
            return 502
        case WalConflict():
            return 409
        case WalRefused():
            return 422
        case ConfigError():
            return 400
        case _:
            return 500


def peer_uid(request: web.Request) -> int | None:
    """Return the uid of the process at the other end of the unix socket, or None if it has gone."""
    connection = request.transport.get_extra_info("socket") if request.transport is not None else None
    if connection is None:
        return None
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return int(_UCRED.unpack(credentials)[1])


def only_peers(allowed: Callable[[], set[int]]) -> Middleware:
    """Refuse (403) whoever is none of the `allowed` uids, which is logged once a minute."""
    news = News(_REMIND_SECONDS, time.monotonic)

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        uid = peer_uid(request)
        if uid is None or uid not in allowed():
            if news.is_news(str(uid)):
                log.warning("peer refused", uid=uid, path=request.path)
            text = f"uid {uid} may not use this socket. Run the hook as PostgreSQL's or the agent's user.\n"
            return web.Response(status=403, text=text)
        return await handler(request)

    return check


def errors_as_answers() -> Middleware:
    """Turn errors into a status and one line of text, which is logged once a minute however often it is the answer."""
    news = News(_REMIND_SECONDS, time.monotonic)

    @web.middleware
    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPException as error:
            error.text = f"{error.reason}: {request.method} {request.path}\n"
            raise
        except AgentError as error:
            return failed(request, error, status_of(error))
        except ImportError as error:
            return failed(request, library_missing(error), 500)
        except ConnectionError:  # with whoever asked: of those to others our errors tell
            log.info("caller went away", path=request.path)
            return web.Response(status=500)
        except Exception as error:
            if news.is_news(f"{request.path} {error!r}"):
                log.exception("request broke", path=request.path)
            return web.Response(status=500, text=f"internal error {type(error).__name__}; see the agent's log\n")

    def failed(request: web.Request, error: AgentError, status: int) -> web.Response:
        if news.is_news(f"{request.path} {error.one_line()}"):
            log.warning("request failed", path=request.path, reason=error.one_line())
        return web.Response(status=status, text=error.one_line() + "\n")

    return answer
