"""Looks into a repository the way a judge would: without the code under test where that is possible."""

from collections.abc import Mapping

from agent.app import outside
from agent.repository.codecs import codec_of
from agent.repository.keys import WAL_FOLDER
from agent.settings import load_settings


async def read_keys(settings: Mapping[str, str]) -> list[str]:
    """Return the keys of all objects of the repository."""
    async with outside(load_settings(settings)) as opened:
        return [info.key async for info in opened.store.list("")]


async def read_wal(settings: Mapping[str, str]) -> dict[str, list[bytes]]:
    """Return the decoded content of every object in `wal_005/`, by the WAL file's name; one name, one object."""
    async with outside(load_settings(settings)) as opened:
        contents: dict[str, list[bytes]] = {}
        async for info in opened.store.list(WAL_FOLDER):
            stored = await opened.store.get(info.key)
            assert stored is not None
            codec = codec_of(info.key)
            name = info.key.removeprefix(WAL_FOLDER).removesuffix(codec.extension)
            contents.setdefault(name, []).append(codec.decompress(stored.body, 1 << 30))
        return contents
