"""The archiver against a model, whatever happens in whatever order: calls, reading ahead, faults, crashes, new files.

Two agents archive into one repository, each out of a data directory of its own, as after a split brain. At every moment
what is stored stays as it is, and one name has one content; whoever was told "archived" finds the content of his file.
"""

import asyncio
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from itertools import count, product
from pathlib import Path

from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.strategies import booleans, integers, lists, sampled_from, tuples
from prometheus_client import CollectorRegistry

from agent.archive.archiver import WalArchiver
from agent.archive.look_ahead import LookAhead
from agent.budget import MemoryBudget
from agent.errors import RepositoryUnavailable, WalConflict, WalRefused
from agent.postgres.data_directory import DataDirectory
from agent.repository.keys import wal_key
from agent.repository.wal_archive import WalArchive, parse_wal_object
from agent.storage.clock import SystemClock
from agent.storage.memory import MemoryObjectStore
from agent.telemetry.metrics import Metrics
from tests.support.object_formats import LZ4, PLAIN, unpack
from tests.support.stepwise import Fate, Job, Request, StepwiseLoop, StepwiseStore, at_once
from tests.support.wal_writer import SEGMENT_BYTES, SYSTEM_IDENTIFIER, WalWriter

FIRST, SECOND = "000000010000000000000001", "000000010000000000000002"
HISTORY = "00000002.history"
NAMES = [HISTORY, FIRST]  # few, so that much happens to each
BAD, ABSENT = "bad", "absent"
FATES = sampled_from([*[Fate.ANSWERED] * 6, Fate.REQUEST_LOST, Fate.ANSWER_LOST, Fate.SENT_TWICE])
NODES = integers(0, 1)


def contents() -> dict[str, dict[str, bytes]]:
    """By name and variant: two good contents, and what the agent must refuse to store under that name."""
    result = {HISTORY: {"one": b"1\t0/1000148\tno recovery target\n", "other": b"1\t0/10001C0\tx\n", "empty": b""}}
    segments: dict[str, list[bytes]] = {}
    for variant in ("one", "other"):
        writer = WalWriter()
        writer.restore_point(variant, 0)
        writer.filler(SEGMENT_BYTES)
        writer.transaction(0x00, 700, 0)
        segments[variant] = writer.segments()
    for index, name in enumerate((FIRST, SECOND)):
        good = segments["one"][index]
        result[name] = {
            "one": good,
            "other": segments["other"][index][:-8] + b"of other",
            "recycled": segments["one"][1 - index],
            "foreign": good[:24] + (SYSTEM_IDENTIFIER + 1).to_bytes(8, "little") + good[32:],
            "cut": good[: SEGMENT_BYTES // 2],
        }
    return result


CONTENTS = contents()
GOOD = ("one", "other")
VARIANT_OF = {(name, content): variant for name, by in CONTENTS.items() for variant, content in by.items()}


class Guard:
    """Both agents are of the cluster that the repository belongs to."""

    async def system_identifier(self) -> int:
        return SYSTEM_IDENTIFIER


@dataclass(eq=False)
class Call:
    """A hook's call for a name, and the variants its file has had since."""

    node: "Node"
    name: str
    task: asyncio.Task[None]
    seen: set[str]


@dataclass(eq=False)
class Node:
    """A data directory and the agent beside it, if one runs.

    ever: the variants that each file has had in the life of this agent, which may be busy with any of them.
    """

    directory: Path
    archiver: WalArchiver
    budget: MemoryBudget
    store: StepwiseStore
    services: list[asyncio.Task[None]]
    variants: dict[str, str] = field(default_factory=lambda: dict.fromkeys(NAMES, ABSENT))
    ever: dict[str, set[str]] = field(default_factory=dict)


class ArchiverModel(RuleBasedStateMachine):
    """Rules: what can happen. Invariants: what holds after each."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = StepwiseLoop()
        self.stored = MemoryObjectStore()
        self.requests: list[Request] = []
        self.calls: list[Call] = []
        self.known: dict[str, bytes] = {}
        self.variant_by_key: dict[str, str] = {}
        self.faults = 0
        self.ticks = count(1_700_000_000)
        self.root = Path(tempfile.mkdtemp(prefix="pitr-model-"))
        self.nodes = [self.new_node(self.root / name) for name in ("a", "b")]

    def teardown(self) -> None:
        try:
            self.come_to_rest()
            for index, name in product((0, 1), NAMES):
                self.ask_in_peace(index, name)
            for node in self.nodes:
                self.stop(node)
        finally:
            self.loop.close()
            shutil.rmtree(self.root)

    def new_node(self, directory: Path) -> Node:
        (directory / "pg_wal" / "archive_status").mkdir(parents=True, exist_ok=True)
        data_directory = DataDirectory(directory)
        store = StepwiseStore(self.stored, self.requests)
        budget, clock, metrics = MemoryBudget(3 * SEGMENT_BYTES), SystemClock(), Metrics(CollectorRegistry())
        archive = WalArchive(store, LZ4)
        archiver = WalArchiver(
            archive, data_directory, Guard(), concurrency=2, budget=budget, clock=clock, metrics=metrics
        )
        look_ahead = LookAhead(archiver, data_directory, clock, metrics)
        services = [self.loop.create_task(service.run()) for service in (archiver, look_ahead)]
        return Node(directory, archiver, budget, store, services)

    def stop(self, node: Node) -> None:
        """End the agent and the hooks that wait for it. Its requests may still be on their way."""
        ended = [call for call in self.calls if call.node is node]
        self.calls = [call for call in self.calls if call.node is not node]
        tasks = [*(call.task for call in ended), *node.services]
        for task in tasks:
            task.cancel()
        self.loop.settle()
        self.loop.jobs[:] = [job for job in self.loop.jobs if not job.answer.done()]
        while not all(task.done() for task in tasks):  # what is cancelled may wait for its thread
            self.loop.do(self.loop.jobs[0])

    @initialize(by_walg=sampled_from([None, None, *NAMES]), variants=lists(sampled_from(GOOD), min_size=5, max_size=5))
    def begin(self, by_walg: str | None, variants: list[str]) -> None:
        """Both have all files, the same or others; WAL-G may have stored one of them before."""
        choice = iter(variants)
        for node, name in product(self.nodes, NAMES):
            self.put_file(node, name, next(choice), anew=True)
        if by_walg is not None:
            at_once(self.stored.put(wal_key(by_walg, PLAIN.extension), CONTENTS[by_walg][next(choice)]))

    @rule(
        node=NODES,
        name=sampled_from(NAMES),
        variant=sampled_from([*GOOD, *GOOD, BAD, ABSENT]),
        anew=booleans(),
        ask=booleans(),
    )
    def change_a_file(self, node: int, name: str, variant: str, anew: bool, ask: bool) -> None:
        """It is replaced, overwritten or removed while an agent may be busy with it, and perhaps asked for again."""
        if variant == BAD:
            bad = sorted(CONTENTS[name].keys() - GOOD)
            variant = bad[next(self.ticks) % len(bad)]
        self.put_file(self.nodes[node], name, variant, anew=anew)
        if ask:
            self.call(self.nodes[node], name)

    def put_file(self, node: Node, name: str, variant: str, *, anew: bool) -> None:
        self.set_variant(node, name, variant)
        path = node.directory / "pg_wal" / name
        ready = path.parent / "archive_status" / f"{name}.ready"
        if anew or variant == ABSENT:
            path.unlink(missing_ok=True)
            ready.unlink(missing_ok=True)
        if variant != ABSENT:
            path.write_bytes(CONTENTS[name][variant])
            moment = next(self.ticks)  # of a file system with a coarse clock two contents might look the same
            os.utime(path, (moment, moment))
            ready.touch()

    def set_variant(self, node: Node, name: str, variant: str) -> None:
        node.ever.setdefault(name, {node.variants[name]}).add(variant)
        node.variants[name] = variant
        for call in self.calls:
            if call.node is node and call.name == name:
                call.seen.add(variant)

    @rule(node=NODES, name=sampled_from(NAMES))
    def ask(self, node: int, name: str) -> None:
        self.call(self.nodes[node], name)

    def call(self, asked: Node, name: str) -> Call:
        task = self.loop.create_task(asked.archiver.archive(name))
        call = Call(asked, name, task, {asked.variants[name]})
        self.calls.append(call)
        self.loop.settle()
        return call

    @rule(steps=lists(tuples(integers(0, 99), FATES), min_size=1, max_size=8))
    def go_on(self, steps: list[tuple[int, Fate]]) -> None:
        """Threads end and requests are answered, or not, in any order."""
        for choice, fate in steps:
            self.go_on_with(choice, fate)

    def go_on_with(self, choice: int, fate: Fate) -> None:
        waiting: list[Job | Request] = [*self.loop.jobs, *self.requests]
        if not waiting:
            return
        chosen = waiting[choice % len(waiting)]
        if isinstance(chosen, Request):
            self.faults += fate is not Fate.ANSWERED
            self.requests.remove(chosen)
            chosen.meet(fate)
            self.loop.settle()
        else:
            self.loop.do(chosen)
        self.look_at_answers()

    @rule(seconds=sampled_from([0.5, 10.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.loop.settle(seconds=seconds)
        self.look_at_answers()

    @precondition(lambda self: self.calls)
    @rule(node=NODES)
    def crash(self, node: int) -> None:
        """The agent dies and is started again. What it has sent may still arrive, or not."""
        dead = self.nodes[node]
        self.stop(dead)
        self.nodes[node] = born = self.new_node(dead.directory)
        born.variants = dict(dead.variants)
        self.loop.settle()

    @precondition(lambda self: not self.loop.jobs and not self.requests)
    @rule(node=NODES, name=sampled_from(NAMES))
    def ask_in_peace(self, node: int, name: str) -> None:
        """When everything else has come to rest, the answer is exactly the one that the model gives."""
        self.come_to_rest()
        before = self.stored_variant(name)
        local = self.nodes[node].variants[name]
        call = self.call(self.nodes[node], name)
        self.come_to_rest()
        assert call.task.done()
        error = call.task.exception()
        if before is not None and local in GOOD and before != local:
            assert isinstance(error, WalConflict)
        elif local in GOOD:
            assert error is None
            assert self.stored_variant(name) == local
        else:
            assert isinstance(error, WalRefused)
            assert self.stored_variant(name) == before

    def come_to_rest(self) -> None:
        self.loop.settle()
        for _ in range(1_000):
            if not self.loop.jobs and not self.requests:
                assert not self.calls, "somebody waits for nothing"
                assert not any(node.budget.used for node in self.nodes)
                return
            self.go_on_with(0, Fate.ANSWERED)
        raise AssertionError("it never comes to rest")

    def look_at_answers(self) -> None:
        """Whoever has an answer has the right one."""
        self.look_at_the_store()
        done = [call for call in self.calls if call.task.done()]
        self.calls = [call for call in self.calls if not call.task.done()]
        for call in done:
            error, held = call.task.exception(), self.stored_variant(call.name)
            ever = call.seen | call.node.ever.get(call.name, set())
            match error:
                case None:
                    assert held in call.seen, "told to be archived, and is not"
                case WalConflict():
                    assert held is not None
                    assert ever - {held}
                case WalRefused():
                    assert len(ever) > 1 or not ever & set(GOOD)
                case RepositoryUnavailable():
                    assert self.faults
                case _:
                    raise error

    def stored_variant(self, name: str) -> str | None:
        held = {variant for key, variant in self.variant_by_key.items() if key.startswith(wal_key(name, ""))}
        assert len(held) <= 1, "one name has two contents"
        return held.pop() if held else None

    @invariant()
    def look_at_the_store(self) -> None:
        """What is stored is whole and good, and never changes."""
        now = {key: stored.body for key, stored in self.stored._objects.items()}
        assert {key: now.get(key) for key in self.known} == self.known, "something stored was replaced or removed"
        for key in now.keys() - self.known.keys():
            item = parse_wal_object(self.stored._objects[key].info)
            assert item is not None
            variant = VARIANT_OF[item.name, unpack(LZ4, key, now[key])]
            assert variant in GOOD
            self.variant_by_key[key] = variant
        self.known = now
        for name in NAMES:
            self.stored_variant(name)

    @invariant()
    def one_upload_per_name_and_agent(self) -> None:
        uploads = [(request.sender, request.key) for request in self.requests if request.what == "PUT"]
        living = {node.store for node in self.nodes}
        uploads = [upload for upload in uploads if upload[0] in living]
        assert len(uploads) == len(set(uploads))


def test_a_file_changed_while_it_is_uploaded_is_not_told_to_be_archived() -> None:
    model = ArchiverModel()
    try:
        model.begin(by_walg=None, variants=["one"] * 5)
        first = model.call(model.nodes[0], FIRST)
        while not any(request.what == "PUT" and FIRST in request.key for request in model.requests):
            model.go_on_with(0, Fate.ANSWERED)
        model.put_file(model.nodes[0], FIRST, "other", anew=False)
        second = model.call(model.nodes[0], FIRST)
        model.loop.do(model.loop.jobs[-1])  # it joins the upload that is under way
        model.come_to_rest()
        assert first.task.exception() is None
        assert isinstance(second.task.exception(), WalConflict)
    finally:
        model.teardown()


TestArchiverModel = ArchiverModel.TestCase
TestArchiverModel.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
