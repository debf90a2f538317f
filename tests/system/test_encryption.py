"""With a key set nothing of the database can be read in the bucket; without that key nothing is restored, or added."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.lab.agent_process import run_pitr
from agent.lab.postgres import PostgresCluster
from agent.lab.seaweedfs import SeaweedServer
from agent.lab.waiting import wait_until
from agent.outside import outside
from agent.repository.keys import BACKUP_FOLDER, WAL_FOLDER
from agent.settings import load_settings
from tests.support.object_formats import unpack
from tests.support.stack import BUCKET, MakeStack, Stack

CANARY = "canary-in-a-coal-mine"
KEY, OTHER_KEY = "a5" * 32, "5a" * 32
BEFORE, AFTER = f"{CANARY} before", f"{CANARY} after"


@pytest.fixture
def encrypted(make_stack: MakeStack, s3_server_of_its_own: SeaweedServer, lab_directory: Path) -> Stack:
    """A stack that encrypts and does not compress, which would hide the canary, too."""
    key_file = lab_directory / "key"
    key_file.write_text(f"{KEY}\n")
    key_file.chmod(0o644)
    settings = {
        **s3_server_of_its_own.environment(BUCKET, "encrypted"),
        "WALG_COMPRESSION_METHOD": "none",
        "WALG_LIBSODIUM_KEY_PATH": str(key_file),
        "WALG_LIBSODIUM_KEY_TRANSFORM": "hex",
    }
    return make_stack(repository=settings)


def fill(stack: Stack) -> None:
    """Have a row in a base backup, and another one in the WAL after it."""
    stack.cluster.execute("CREATE TABLE secrets (what text)", f"INSERT INTO secrets VALUES ('{BEFORE}')")
    done = run_pitr("backup", "now", settings=stack.agent.settings)
    assert done.returncode == 0, done.stderr
    stack.cluster.execute(f"INSERT INTO secrets VALUES ('{AFTER}')")
    stack.cluster.wait_until_archived(stack.cluster.switch_wal())


def restore_settings(stack: Stack, directory: Path) -> dict[str, str]:
    return {
        **stack.repository,
        "PGDATA": str(directory),
        "AUTO_START": "true",
        "PITR_POSTGRES_BIN": str(stack.cluster.binaries.directory),
        "PITR_HOOK_DIR": str(stack.hooks),
        "PITR_SOCKET": str(directory.parent / "restore.sock"),
        "TMPDIR": str(directory.parent),
    }


async def read_bucket(stack: Stack) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Return every object as it is stored, and those of WAL and tars as they unpack."""
    async with outside(load_settings(stack.repository)) as opened:
        stored: dict[str, bytes] = {}
        plain: dict[str, bytes] = {}
        async for info in opened.store.list(""):
            held = await opened.store.get(info.key)
            assert held is not None
            stored[info.key] = held.body
            if not info.key.endswith(".json"):
                plain[info.key] = unpack(opened.objects, info.key, held.body)
        return stored, plain


async def test_what_is_archived_and_backed_up_is_encrypted_and_restored(encrypted: Stack, lab_directory: Path) -> None:
    await asyncio.to_thread(fill, encrypted)
    stored, plain = await read_bucket(encrypted)
    for folder, row in ((BACKUP_FOLDER, BEFORE), (WAL_FOLDER, AFTER)):
        shown = [key for key, content in plain.items() if key.startswith(folder) and row.encode() in content]
        assert shown, f"{row} is in {folder}"
    assert [key for key, body in stored.items() if CANARY.encode() in body] == []

    done = await asyncio.to_thread(run_pitr, "backup", "now", "--delta", "--json", settings=encrypted.agent.settings)
    assert done.returncode == 0, done.stderr
    assert "_D_" in done.stdout
    directory = lab_directory / "restored"
    done = await asyncio.to_thread(run_pitr, "restore", settings=restore_settings(encrypted, directory))
    assert done.returncode == 0, done.stderr
    with PostgresCluster(directory, encrypted.cluster.binaries) as restored:
        await asyncio.to_thread(restored.start)
        assert restored.query("SELECT what FROM secrets ORDER BY what") == [(AFTER,), (BEFORE,)]


def without_key(settings: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in settings.items() if not name.startswith("WALG_LIBSODIUM")}


def with_other_key(settings: dict[str, str]) -> dict[str, str]:
    return {**settings, "WALG_LIBSODIUM_KEY": OTHER_KEY}


def test_without_the_key_nothing_is_restored_and_the_setting_is_named(encrypted: Stack, lab_directory: Path) -> None:
    fill(encrypted)
    right = restore_settings(encrypted, lab_directory / "restored")
    for settings, codes in ((with_other_key(right), {23}), (without_key(right), {22, 23})):
        for command in (("restore", "--plan"), ("restore",)):
            done = run_pitr(*command, settings=settings)
            assert done.returncode in codes, done.stderr
            assert "WALG_LIBSODIUM_KEY" in done.stderr
            assert KEY not in done.stderr
            assert OTHER_KEY not in done.stderr
    assert not any((lab_directory / "restored").glob("*"))


@pytest.mark.parametrize("change", [with_other_key, without_key])
def test_nothing_is_added_with_another_key(
    make_stack: MakeStack, s3_server_of_its_own: SeaweedServer, change: Callable[[dict[str, str]], dict[str, str]]
) -> None:
    key = {"WALG_LIBSODIUM_KEY": KEY, "WALG_LIBSODIUM_KEY_TRANSFORM": "hex"}
    stack = make_stack(repository={**s3_server_of_its_own.environment(BUCKET, "one-key"), **key})
    stack.cluster.wait_until_archived(stack.cluster.switch_wal())
    right = stack.agent.settings
    stack.agent.settings = change(right)
    stack.agent.restart()
    stack.cluster.execute("CREATE TABLE added ()")
    segment = stack.cluster.switch_wal()
    wait_until(lambda: "WALG_LIBSODIUM_KEY" in stack.cluster.log_text(), seconds=60, what="the hook to name the key")
    refused = run_pitr("backup", "now", settings=stack.agent.settings)
    assert refused.returncode == 50
    assert "WALG_LIBSODIUM_KEY" in refused.stderr
    assert KEY not in stack.agent.log_text() + stack.cluster.log_text()
    stack.agent.settings = right
    stack.agent.restart()
    stack.cluster.execute("CREATE TABLE added_then ()")
    stack.cluster.switch_wal()  # wakes PostgreSQL's archiver, which waits a minute after three failures
    stack.cluster.wait_until_archived(segment)
