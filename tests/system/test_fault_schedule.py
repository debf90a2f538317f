"""One writer, and everything that goes wrong between its server and the store, one after the other; then a recovery.

`pytest --fault-rounds 20 tests/system/test_fault_schedule.py` soaks: so many rounds, each in an order of its own.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import pytest

from agent.lab.agent_process import run_pitr
from agent.lab.postgres import PostgresCluster
from agent.lab.privileges import hand_over
from agent.lab.seaweedfs import SeaweedServer
from agent.lab.waiting import wait_until
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.ledger import Ledger
from tests.support.name_service import NAME, NameService
from tests.support.stack import MakeStack, Stack
from tests.support.store_guards import KeyRing, StoreClock, TokenService

T = TypeVar("T")

SECONDS = 90
PASSING = {
    "slow down": Fault(status=503, code="SlowDown"),
    "internal error": Fault(status=500, code="InternalError"),
    "request reset": Fault(drop_request=True, reset=True),
    "request cut": Fault(drop_request=True),
    "stored, and the answer lost": Fault(method="PUT", drop_answer=True),
    "stored, and the answer reset": Fault(method="PUT", drop_answer=True, reset=True),
    "answer cut short": Fault(method="GET", cut_after=20),
    "no answer": Fault(black_hole=True),
    "late answer": Fault(delay_seconds=0.5),
}
READING = (
    Fault("GET", "wal_005|tar_", times=2, status=503, code="SlowDown"),
    Fault("GET", "wal_005/0|tar_", times=2, cut_after=1000),
    Fault("GET", "wal_005/0|tar_", times=2, cut_after=5000, reset=True),
    Fault("GET", "wal_005/0", flip_byte=200),  # once: what is read twice and is bad twice, is taken for damaged
    Fault("GET", times=2, drop_request=True, reset=True),
    Fault("GET", "wal_005", times=2, black_hole=True),
)
FAST_RETRIES = {"PITR_STORE_TIMEOUT": "2"}


def in_thread(function: Callable[..., T], *arguments: object, **options: object) -> Awaitable[T]:
    return asyncio.to_thread(function, *arguments, **options)


@dataclass
class Scene:
    """A server whose writer works on, its agent, and what stands between the agent and the store."""

    stack: Stack
    ledger: Ledger
    proxy: FaultProxy
    names: NameService
    clock: StoreClock
    keys: KeyRing
    key_file: Path
    tokens: TokenService

    def write_key_file(self) -> None:
        """Put a new access key into the file that the agent has its keys from."""
        key = self.keys.issue()
        self.key_file.write_text(
            f"[default]\naws_access_key_id = {key.access_key}\naws_secret_access_key = {key.secret_key}\n"
        )

    async def archives(self) -> None:
        """Wait until a segment that is finished from now on is archived."""
        await in_thread(self.ledger.wait_for, 1, seconds=SECONDS)
        segment = await in_thread(self.stack.cluster.switch_wal)
        await in_thread(self.stack.cluster.wait_until_archived, segment, seconds=SECONDS)

    async def tries(self) -> None:
        """Wait until the agent asks the store anything."""
        wanted = len(self.proxy.requests) + 1
        await in_thread(self.ledger.wait_for, 1, seconds=SECONDS)
        await in_thread(self.stack.cluster.switch_wal)
        await in_thread(wait_until, lambda: len(self.proxy.requests) >= wanted, seconds=SECONDS, what="a request")


async def fails(scene: Scene, *, attempts: int = 1) -> None:
    """Wait until so many attempts of the agent have failed."""
    agent, metric = scene.stack.agent, "pitr_repository_failed_attempts_total"
    wanted = await in_thread(agent.metric, metric) + attempts
    await in_thread(scene.stack.cluster.switch_wal)
    await in_thread(wait_until, lambda: agent.metric(metric) >= wanted, seconds=SECONDS, what="attempts to fail")


async def passing_faults(scene: Scene, name: str) -> None:
    scene.proxy.add(replace(PASSING[name], times=3))
    await in_thread(scene.stack.cluster.switch_wal)
    await in_thread(wait_until, lambda: not scene.proxy.pending(), seconds=SECONDS, what="three faults to be met")


async def name_service_away(scene: Scene) -> None:
    scene.names.fail()
    # Each request over a new connection: one that is kept open needs no name.
    scene.proxy.add(Fault(cut_after=1 << 30, times=1_000_000))
    await scene.proxy.cut()
    await fails(scene)
    scene.names.recover()
    scene.proxy.clear()


async def store_away(scene: Scene) -> None:
    """Its outage is told once, not at every attempt."""
    agent, said = scene.stack.agent, len(list(scene.stack.agent.log_lines()))
    await scene.proxy.stop()
    await fails(scene, attempts=6)
    told = [line for line in list(agent.log_lines())[said:] if line.get("level") in ("warning", "error")]
    assert len(told) <= 3, told
    await scene.proxy.start()


async def clock_ahead(scene: Scene) -> None:
    scene.clock.ahead = timedelta(minutes=20)
    await fails(scene)
    assert "behind the store's" in scene.stack.agent.log_text()
    scene.clock.ahead = timedelta(0)


async def keys_rotated(scene: Scene) -> None:
    scene.keys.revoke_all()
    await scene.tries()
    scene.write_key_file()


async def identity_rotated(scene: Scene) -> None:
    """The agent starts anew with a web identity, and has both its token and its session taken away."""
    scene.stack.agent.kill()
    settings = {**scene.stack.agent.settings, **scene.tokens.environment}
    del settings["AWS_SHARED_CREDENTIALS_FILE"]
    own, scene.stack.agent.settings = scene.stack.agent.settings, settings
    await in_thread(scene.stack.agent.start)
    await scene.archives()
    scene.keys.revoke_all()
    scene.tokens.rotate()
    await scene.archives()
    scene.stack.agent.kill()
    scene.write_key_file()
    scene.stack.agent.settings = own
    await in_thread(scene.stack.agent.start)


async def agent_killed(scene: Scene) -> None:
    scene.stack.agent.kill()
    await in_thread(scene.stack.agent.start)


async def server_killed(scene: Scene) -> None:
    scene.stack.cluster.kill()
    await in_thread(scene.stack.cluster.start)


STEPS: dict[str, Callable[[Scene], Awaitable[None]]] = {
    **{name: lambda scene, name=name: passing_faults(scene, name) for name in PASSING},  # type: ignore[misc]
    "name service away": name_service_away,
    "store away": store_away,
    "clock ahead": clock_ahead,
    "keys rotated": keys_rotated,
    "identity rotated": identity_rotated,
    "agent killed": agent_killed,
    "server killed": server_killed,
}


@pytest.fixture
async def scene(
    make_stack: MakeStack,
    s3_server: SeaweedServer,
    s3_environment: dict[str, str],
    lab_directory: Path,
    tmp_path: Path,
) -> AsyncIterator[Scene]:
    """A scene whose agent takes its keys from a file."""
    keys, clock = KeyRing(s3_server), StoreClock()
    names, key_file = NameService(lab_directory), lab_directory / "keys"
    async with AsyncExitStack() as resources:
        proxy = await resources.enter_async_context(FaultProxy(s3_server.endpoint, guards=[clock, keys]))
        tokens = await resources.enter_async_context(TokenService(keys, lab_directory / "token"))
        repository = {
            **{name: value for name, value in s3_environment.items() if "_KEY" not in name},
            **names.environment,
            **FAST_RETRIES,
            "AWS_ENDPOINT": proxy.endpoint.replace("127.0.0.1", NAME),
            "AWS_SHARED_CREDENTIALS_FILE": str(key_file),
        }
        key = keys.issue()
        key_file.write_text(
            f"[default]\naws_access_key_id = {key.access_key}\naws_secret_access_key = {key.secret_key}\n"
        )
        hand_over(lab_directory)
        stack = await in_thread(make_stack, repository=repository)
        with Ledger(stack.cluster, tmp_path / "ledger") as ledger:
            yield Scene(stack, ledger, proxy, names, clock, keys, key_file, tokens)


async def end_in_the_middle_of_an_outage(scene: Scene) -> None:
    """Stop server and agent while the store is silent; the agent ends when the store is back and all is archived."""
    scene.proxy.add(Fault(black_hole=True, times=1_000_000))
    await in_thread(scene.ledger.wait_for, 300, seconds=SECONDS)
    scene.ledger.stop()
    await in_thread(scene.stack.cluster.stop, "fast", seconds=60)
    scene.stack.agent.signal(15)
    scene.proxy.clear()
    await scene.proxy.cut()
    assert await in_thread(scene.stack.agent.wait, seconds=SECONDS) == 0, scene.stack.agent.log_tail()
    assert [line["event"] for line in scene.stack.agent.log_lines()][-2:] == ["drained", "agent stopped"]


async def recover(scene: Scene, directory: Path) -> PostgresCluster:
    """Restore all that the repository holds, over a store that fails in every way; return the cluster, not started."""
    scene.proxy.add(*map(replace, READING))
    settings = {
        **scene.stack.repository,
        "PGDATA": str(directory),
        "PITR_HOOK_DIR": str(scene.stack.hooks),
        "PITR_POSTGRES_BIN": str(scene.stack.cluster.binaries["postgres"].parent),
        "AUTO_START": "true",
    }
    done = await in_thread(run_pitr, "restore", settings=settings)
    assert done.returncode == 0, done.stderr
    assert not scene.proxy.pending(), "a fault was not met"
    return PostgresCluster(directory, scene.stack.cluster.binaries)


async def test_a_recovery_after_every_fault_has_exactly_the_committed_rows(
    scene: Scene, lab_directory: Path, pytestconfig: pytest.Config
) -> None:
    taken = await in_thread(run_pitr, "backup", "now", settings=scene.stack.agent.settings)
    assert taken.returncode == 0, taken.stderr
    for number in range(pytestconfig.getoption("fault_rounds")):
        for name in random.sample(list(STEPS), len(STEPS)):
            print(f"round {number}: {name}")
            await STEPS[name](scene)
            await scene.archives()
    await end_in_the_middle_of_an_outage(scene)
    with await recover(scene, lab_directory / "restored") as restored:
        await in_thread(restored.start)
        scene.ledger.require_all_in(restored)
