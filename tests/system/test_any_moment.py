"""Whatever was written, backed up and branched: a restore to any moment gives exactly what was committed up to it.

Rounds at random: writers at work, base backups, crashes, restore points; targets of every kind, each of which the plan
is asked for and some of which are restored; then the cluster goes on from one of them as its own successor.

`pytest --restore-rounds 50 tests/system/test_any_moment.py` soaks; `--restore-seed` repeats the choices of a run that
failed, `--restore-major` takes another PostgreSQL.
"""

import asyncio
import json
import random
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from agent.domain.lsn import format_lsn
from agent.domain.restore_plan import RestorePlan
from agent.domain.restore_target import RestoreTarget, parse_restore_target
from agent.errors import NoRestorePath
from agent.lab.agent_process import AgentProcess, run_pitr
from agent.lab.postgres import PostgresCluster
from agent.lab.waiting import wait_until
from agent.outside import Outside, outside
from agent.repository.backups import read_catalog
from agent.restore.planner import NEWEST, plan_from_repository
from agent.settings import load_settings
from tests.support.agent_process import MakeAgent
from tests.support.past import TABLES, Expected, Life, Past, Tellers
from tests.support.stack import MakeStack, Stack

PLANNED, RESTORED = 12, 2  # targets a round
POINTS = ("monday", "tuesday")  # few names, so that some are given twice
MICROSECOND = timedelta(microseconds=1)
Target = dict[str, str]
Plan = RestorePlan | NoRestorePath


@dataclass
class Journey:
    """A cluster on its way through timelines: what runs now, and all that was."""

    chance: random.Random
    past: Past
    stack: Stack
    make_agent: MakeAgent
    cluster: PostgresCluster
    agent: AgentProcess
    timeline: int = 1

    @property
    def life(self) -> Life:
        """What is known of the present timeline."""
        return self.past.lives[self.timeline]

    def live(self) -> None:
        """Let the writers write while this and that happens; then stop; all is archived on return."""
        with Tellers(self.cluster, self.life, self.chance.randrange(1 << 30)).writing() as tellers:
            steps = self.chance.choices(list(STEPS), k=3)
            for step in self.chance.sample([*steps, "back up", "back up", "name"], 6):
                print(f"timeline {self.timeline}: {step}")
                STEPS[step](self)
                tellers.wait_for(self.chance.randint(1, 40))
        self.show()

    def show(self) -> None:
        """Let the archive show a moment after the last transaction; then stop."""
        self.cluster.execute("SELECT pg_sleep(1.1)", "CHECKPOINT")  # a checkpoint's time is in whole seconds
        self.life.shown_until = self.cluster.value("SELECT checkpoint_time FROM pg_control_checkpoint()")
        self.cluster.stop()  # all of its WAL is archived then, and nothing comes after

    def back_up(self) -> None:
        """Take a base backup: a delta, if the settings want one, or else a full one."""
        kind = self.chance.choice([["--full"], [], []])
        done = run_pitr("backup", "now", *kind, settings=self.agent.settings)
        assert done.returncode == 0, done.stderr

    def name(self) -> None:
        self.cluster.execute(f"SELECT pg_create_restore_point('{self.chance.choice(POINTS)}')")

    def crash(self) -> None:
        self.cluster.kill()
        self.cluster.start()

    def change_files(self) -> None:
        """Make, fill and replace files, behind the backs of deltas; of no table that a prepared transaction locks."""
        self.cluster.execute(
            "DROP TABLE IF EXISTS side",
            "CREATE TABLE side AS SELECT n, repeat('x', 200) AS filler FROM generate_series(1, 500) AS n",
            "TRUNCATE side",
            "VACUUM FULL accounts" if self.chance.random() < 0.5 else "VACUUM history",
            "REINDEX TABLE accounts",
        )

    async def plan_all(self) -> list[tuple[Target, Plan]]:
        """Take in what is archived, and which base backups there are; return targets with what the plan says."""
        self.past.read_wal()
        async with outside(load_settings(self.stack.repository)) as opened:
            self.past.backups = await read_catalog(opened.store)
            targets = [self.target(kind) for kind in self.chance.choices(KINDS, k=PLANNED)]
            return [(target, await self.plan(opened, target)) for target in targets]

    async def plan(self, opened: Outside, settings: Target) -> Plan:
        """Return what the plan says, after comparing it with what is known."""
        target, backup_name = parse_restore_target(settings), settings.get("BACKUP_NAME")
        expected = self.past.expect(target, backup_name)
        try:
            plan = await plan_from_repository(opened.store, opened.archive, target, backup_name or NEWEST)
        except NoRestorePath as refused:
            if not all(self.may_pass_over(each, target) for each in expected):
                pytest.fail(f"refused, but {[each.backup for each in expected]} lead there: {refused.one_line()}")
            return refused
        newer = []
        for each in expected:
            if each.backup == plan.backup.name:
                break
            newer.append(each)
        else:
            pytest.fail(f"planned from {plan.backup.name}, but only {[each.backup for each in expected]} lead there")
        assert all(self.may_pass_over(each, target) for each in newer), plan.backup.name
        # A timeline that left within the last segment, after the target, may not be followed.
        assert plan.timeline in [number for number, *_ in self.past.path(self.past.timeline_of(target, backup_name))]
        # Where a timeline was left within the segment, its successor's copy of it is read.
        assert plan.first_segment[8:] == plan.backup.start_segment[8:]
        return plan

    def may_pass_over(self, expected: Expected, target: RestoreTarget) -> bool:
        """Tell whether a plan may take an older base backup: until the metadata's time the newer may be incomplete."""
        backup = next(each for each in self.past.backups if each.name == expected.backup)
        return target.time is not None and target.time < backup.finish_time

    def target(self, kind: str) -> Target:
        how = {
            "TARGET_TIMELINE": self.chance.choice(["latest", "latest", "current", *map(str, self.past.lives)]),
            "TARGET_INCLUSIVE": self.chance.choice(["true", "false"]),
        }
        if self.chance.random() < 0.2:
            how["BACKUP_NAME"] = self.chance.choice(self.past.backups).name
        timeline = self.past.timeline_of(parse_restore_target(how), how.get("BACKUP_NAME"))
        records = self.past.records(timeline)
        ended = self.chance.choice([each for each in records if each.ends is not None])
        match kind:
            case "time":
                assert ended.time is not None
                near = ended.time + self.chance.choice([timedelta(0), timedelta(0), MICROSECOND, -MICROSECOND])
                idle, future = self.life.shown_until or near, datetime.now(UTC) + timedelta(hours=1)
                moment = self.chance.choices([near, idle, future], [8, 1, 1])[0]
                return {**how, "TARGET_TIME": moment.isoformat()}
            case "LSN":
                lsn = self.chance.choice([ended.lsn, self.chance.choice(records).lsn])
                return {**how, "TARGET_LSN": format_lsn(lsn)}
            case "xid":
                return {**how, "TARGET_XID": str(self.chance.choices([ended.xid, 1_000_000_000], [12, 1])[0])}
            case "name":
                return {**how, "TARGET_NAME": self.chance.choices([*POINTS, "doomsday"], [6, 6, 1])[0]}
            case "immediate":
                return {**how, "TARGET_IMMEDIATE": "true"}
        return how

    def restore(self, target: Target, directory: Path, **more: str) -> "subprocess.CompletedProcess[str]":
        settings = {
            **self.stack.repository,
            **target,
            "PGDATA": str(directory),
            "PITR_HOOK_DIR": str(self.stack.hooks),
            "PITR_POSTGRES_BIN": str(self.cluster.binaries.directory),
            "AUTO_START": "true",
            **more,
        }
        return run_pitr("restore", "--json", settings=settings)

    def judge(self, target: Target, plan: Plan, directory: Path) -> None:
        """Restore to `target`; compare what came of it with what the plan said, and the rows with what is known."""
        print(f"restore {target}")
        done = self.restore(target, directory)
        if isinstance(plan, NoRestorePath):
            assert done.returncode == 40, done.stderr
            assert not directory.exists() or not list(directory.iterdir())
            return
        assert done.returncode == 0, done.stderr
        outcome: dict[str, Any] = json.loads(done.stdout)
        assert (outcome["backup"], outcome["timeline"]) == (plan.backup.name, plan.timeline)
        expected = self.expected(plan)
        assert outcome["last_commit_at"] == _text(expected.last_at)
        with PostgresCluster(directory, self.cluster.binaries) as restored:
            restored.start()
            assert outcome["prepared_transactions"] == restored.value("SELECT count(*) FROM pg_prepared_xacts")
            self.require_rows(restored, plan, expected)

    def expected(self, plan: RestorePlan) -> Expected:
        (expected,) = self.past.expect(replace(plan.target, timeline=str(plan.timeline)), plan.backup.name)
        return expected

    def require_rows(self, restored: PostgresCluster, plan: RestorePlan, expected: Expected) -> None:
        rows = dict(map(tuple[int, datetime], restored.query("SELECT id, at FROM history")))
        assert set(rows) == expected.rows
        wrong = restored.query(
            "SELECT aid, balance, sum(delta) FROM accounts LEFT JOIN history USING (aid)"
            " GROUP BY aid, balance HAVING balance <> coalesce(sum(delta), 0)"
        )
        assert not wrong, "an account is not what its history says"
        if plan.target.time is not None:
            assert all(at <= plan.target.time for at in rows.values()), "a row is from after the target"
            owed = self.past.owed_by(plan.timeline, plan.target.time - MICROSECOND)
            assert owed <= set(rows), "a client was told that it was committed before the target"

    def is_open(self) -> bool:
        """Tell whether recovery has ended: before that nobody is let in, for hot_standby is off."""
        assert self.cluster.pid is not None, self.cluster.log_tail()
        try:
            return self.cluster.value("SELECT NOT pg_is_in_recovery()") is True
        except psycopg.OperationalError:
            return False

    def branch(self, target: Target, plan: RestorePlan, directory: Path) -> None:
        """Go on from `target` with a successor of the present server."""
        print(f"go on from {target}")
        self.agent.stop()
        starts_itself = self.chance.random() < 0.5
        done = self.restore(
            target, directory, PITR_ARCHIVE_AFTER_RESTORE="true", AUTO_START=str(not starts_itself).lower()
        )
        assert done.returncode == 0, done.stderr
        self.cluster = PostgresCluster(directory, self.cluster.binaries)
        agent = {**self.agent.settings, **self.cluster.client_environment}
        del agent["PITR_SOCKET"], agent["PITR_HTTP_LISTEN"]
        self.agent = self.make_agent(agent, name=f"{directory.name}-agent")
        self.agent.start()
        self.cluster.environment["PITR_SOCKET"] = str(self.agent.socket)
        self.cluster.start()
        wait_until(self.is_open, seconds=120, what="recovery to end")
        self.require_rows(self.cluster, plan, self.expected(plan))
        self.timeline = self.cluster.value("SELECT timeline_id FROM pg_control_checkpoint()")
        assert self.timeline == max(self.past.lives) + 1
        next_xid = self.cluster.value("SELECT txid_snapshot_xmax(txid_current_snapshot()) & 4294967295")
        self.past.lives[self.timeline] = Life(first_xid=next_xid)


STEPS: dict[str, Callable[[Journey], object]] = {
    "back up": Journey.back_up,
    "name": Journey.name,
    "crash": Journey.crash,
    "change files": Journey.change_files,
    "checkpoint": lambda journey: journey.cluster.execute("CHECKPOINT"),
    "switch": lambda journey: journey.cluster.switch_wal(),
}
KINDS = ("time", "time", "time", "LSN", "LSN", "xid", "xid", "name", "immediate", "end of WAL")


def _text(moment: datetime | None) -> str | None:
    return None if moment is None else moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def test_a_restore_to_any_moment_gives_exactly_what_was_committed_up_to_it(
    make_stack: MakeStack,
    make_agent: MakeAgent,
    s3_environment: dict[str, str],
    lab_directory: Path,
    pytestconfig: pytest.Config,
) -> None:
    seed = pytestconfig.getoption("restore_seed")
    seed = random.SystemRandom().randrange(1 << 30) if seed is None else seed
    print(f"--restore-seed {seed}")
    chance = random.Random(seed)
    settings = {
        "WALG_COMPRESSION_METHOD": chance.choice(["zstd", "lz4"]),
        "WALG_DELTA_MAX_STEPS": str(chance.randint(1, 4)),
        **({"WALG_LIBSODIUM_KEY": "01" * 32, "WALG_LIBSODIUM_KEY_TRANSFORM": "hex"} if chance.random() < 0.5 else {}),
    }
    major = pytestconfig.getoption("restore_major")
    stack = make_stack(repository={**s3_environment, **settings}, major=major)
    stack.cluster.configure(
        max_prepared_transactions=50, **({"summarize_wal": True} if major >= 17 and chance.random() < 0.5 else {})
    )
    stack.cluster.restart()
    stack.keep_copies()
    stack.cluster.execute(*TABLES)
    past = Past(stack.cluster.binaries, stack.copies, {1: Life()})
    journey = Journey(chance, past, stack, make_agent, stack.cluster, stack.agent)
    for number in range(pytestconfig.getoption("restore_rounds")):
        journey.live()
        planned = asyncio.run(journey.plan_all())
        reached = [(target, plan) for target, plan in planned if isinstance(plan, RestorePlan)]
        for target, plan in chance.sample(planned, RESTORED):
            directory = lab_directory / f"restored-{number}"
            journey.judge(target, plan, directory)
            subprocess.run(["rm", "-rf", directory], check=True)
        journey.branch(*chance.choice(reached), lab_directory / f"life-{number + 2}")
    journey.cluster.kill()
