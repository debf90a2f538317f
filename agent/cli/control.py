"""Client of the running agent's control API, over its unix socket."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from agent.errors import AgentAnswer, AgentUnavailable

_HINT = "Run this beside a running agent (kubectl exec ... -c pitr-agent), with the same PITR_SOCKET."


@asynccontextmanager
async def _connected(socket: Path) -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.UnixConnector(str(socket))
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=60)
    async with aiohttp.ClientSession("http://pitr", connector=connector, timeout=timeout) as session:
        try:
            yield session
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise AgentUnavailable(f"no agent answers on {socket}: {reason}", hint=_HINT) from error


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    try:
        async for line in response.content:
            yield line
    except aiohttp.ClientError as error:
        raise AgentUnavailable(
            "the agent ended before it had answered", hint="Its log says why; what was asked for was given up."
        ) from error


async def _refused(response: aiohttp.ClientResponse) -> AgentAnswer:
    text = (await response.text()).strip()
    return AgentAnswer(text or f"the agent answered {response.status}", hint="", exit_code=1)


async def ask(socket: Path, path: str, *, method: str = "GET") -> dict[str, Any]:
    """Send a request and return the JSON object of the answer; errors as of `post_lines`."""
    async with _connected(socket) as session, session.request(method, path) as response:
        if response.status != 200:
            raise await _refused(response)
        answer: dict[str, Any] = await response.json()
        return answer


async def post_lines(socket: Path, path: str, parameters: Mapping[str, str]) -> AsyncIterator[dict[str, Any]]:
    """Send a POST and yield the JSON lines of the answer.

    Raises:
        AgentUnavailable: Nobody listens on the socket, or the answer broke off.
        AgentAnswer: The agent told an error.
    """
    async with _connected(socket) as session, session.post(path, params=parameters) as response:
        if response.status != 200:
            raise await _refused(response)
        async for line in _lines(response):
            values = json.loads(line)
            if "error" in values:
                raise AgentAnswer(values["error"], hint=values["hint"], exit_code=values["exit_code"])
            yield values
