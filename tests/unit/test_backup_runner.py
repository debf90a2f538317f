"""What a base backup that fails leaves of the agent."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest

from agent.backup.order import BackupOrder
from agent.backup.runner import BackupRunner, TakesBackups
from agent.errors import AgentError
from agent.ports import Postgres
from agent.postgres.data_directory import DataDirectory
from agent.storage.clock import SystemClock
from agent.tasks import task_group


class ReplacedCode:
    """A server of which nothing is asked before the code that would ask cannot be imported."""

    @asynccontextmanager
    async def only_backup(self) -> AsyncIterator[None]:
        import agent.was_there_before  # type: ignore[import-not-found]  # noqa: F401

        yield


async def test_code_that_a_new_release_has_replaced_fails_the_base_backup_and_not_the_agent(tmp_path: Path) -> None:
    taker = cast(TakesBackups, None)
    runner = BackupRunner(taker, cast(Postgres, ReplacedCode()), DataDirectory(tmp_path), SystemClock())
    async with task_group() as group:
        running = group.create_task(runner.run())
        await asyncio.sleep(0)
        run = runner.start(BackupOrder())
        await run.ended()
        with pytest.raises(AgentError, match=r"agent\.was_there_before cannot be imported"):
            run.result()
        assert not running.done()
        running.cancel()
