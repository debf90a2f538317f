"""Looks into a repository the way a judge would: without the code under test where that is possible."""

import json
from collections.abc import Mapping
from typing import Any

from agent.outside import outside
from agent.ports import ObjectStore
from agent.repository.keys import WAL_FOLDER, files_metadata_key
from agent.repository.wal_archive import parse_wal_object
from agent.settings import load_settings
from tests.support.object_formats import unpack


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
            item = parse_wal_object(info)
            assert item is not None
            contents.setdefault(item.name, []).append(unpack(opened.objects, info.key, stored.body))
        return contents


async def read_files_metadata(store: ObjectStore, backup: str) -> dict[str, Any]:
    """Return the `files_metadata.json` of a base backup."""
    stored = await store.get(files_metadata_key(backup))
    assert stored is not None
    document: dict[str, Any] = json.loads(stored.body)
    return document
