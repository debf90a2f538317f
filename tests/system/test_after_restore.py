"""After replay: the restored server is checked, and a Pushgateway is told how it went."""

import json
from pathlib import Path

import pytest

from agent.lab.postgres import PostgresCluster
from tests.support.agent_process import RunPitr
from tests.support.postgres import FindBinaries
from tests.support.pushgateway import pushgateway
from tests.support.walg_buckets import RecoveryPoint, WalgBucket, answers, needs_walg_buckets, restore_settings

pytestmark = needs_walg_buckets

BUCKET = WalgBucket("pg15-lz4-full")
CHECKPOINT = next(content for content in BUCKET.expected["checkpoints"] if content["id"] == "after-drop")
POINT = RecoveryPoint(BUCKET, "after-drop", "TARGET_TIME", CHECKPOINT["target_time"])


@pytest.fixture
def settings(lab_directory: Path, hook_directory: Path, postgres_binaries: FindBinaries) -> dict[str, str]:
    """Settings that restore a point in time into `lab_directory`/restored."""
    return restore_settings(POINT, lab_directory, hook_directory, postgres_binaries(BUCKET.major))


def test_a_server_that_fails_its_queries_stays_and_may_be_checked_again(
    settings: dict[str, str], pitr: RunPitr, postgres_binaries: FindBinaries, lab_directory: Path
) -> None:
    queries = lab_directory / "queries.sql"
    queries.write_text("SELECT count(*) AS rows_of_pg_class FROM pg_class;\nSELECT 1 > 2 AS everything_is_there;")
    with pushgateway() as gateway:
        settings |= {"PITR_VALIDATE_SQL": f"@{queries}", "PITR_PUSHGATEWAY": gateway.url}
        done = pitr("restore", settings=settings)
        assert done.returncode == 52, done.stderr
        assert "does not pass 1 of 2 checks: query 2 (everything_is_there): f" in done.stderr
        assert (gateway.samples()["pitr_restore_success"], gateway.samples()["pitr_restore_exit_code"]) == (0, 52)

        for wrong, told in (
            ("SELECT 1; SELECT no_such_column FROM pg_class", 'column "no_such_column" does not exist, at: no_such'),
            (
                "SELECT 1 WHERE false; SELECT 0.00; SELECT NULL",
                "query 1 (?column?): no row; query 2 (?column?): 0.00; query 3 (?column?): null",
            ),
            ("CREATE TABLE t (x int)", "read-only transaction"),
        ):
            done = pitr("restore", settings={**settings, "PITR_VALIDATE_SQL": wrong})
            assert done.returncode == 52, done.stderr
            assert told in " ".join(done.stderr.split())

        settings["PITR_VALIDATE_SQL"] = "SET search_path = public; SELECT true AS fine; SELECT 'a; b'"
        done = pitr("restore", "--json", settings=settings)
        assert done.returncode == 0, done.stderr
        checks = json.loads(done.stdout)["checks"]
        assert [(check["name"], check["passed"], check["said"]) for check in checks] == [
            ("query 1 (fine)", True, "t"),
            ("query 2 (?column?)", True, "a; b"),
        ]
        assert gateway.samples()["pitr_restore_success"] == 1
        assert gateway.pushed[-1][0] == "PUT"
    with PostgresCluster(lab_directory / "restored", postgres_binaries(BUCKET.major)) as restored:
        restored.start()
        assert answers(restored, POINT) == POINT.answers


def test_the_outcome_is_told_in_a_line_and_to_the_pushgateway(settings: dict[str, str], pitr: RunPitr) -> None:
    with pushgateway() as gateway:
        done = pitr("restore", settings={**settings, "PITR_PUSHGATEWAY": gateway.url})
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "of WAL, timeline 2, stopped cleanly" in said
    assert "planning" in said
    samples = gateway.samples()
    assert samples["pitr_restore_timeline"] == 2
    assert samples["pitr_restore_wal_bytes"] > 0
    assert samples["pitr_restore_base_backup_bytes"] > 0
    assert samples["pitr_restore_restored_to_timestamp_seconds"] > 1.7e9
    assert samples['pitr_restore_stage_seconds{stage="replaying"}'] > 0


def test_what_the_checks_need_is_missed_before_anything_is_downloaded(
    settings: dict[str, str], pitr: RunPitr, lab_directory: Path
) -> None:
    for change, told in (
        ({"PITR_VALIDATE": "amcheck"}, "pg_amcheck is not in"),
        ({"PITR_VALIDATE_SQL": f"@{lab_directory}/absent.sql"}, "absent.sql cannot be read"),
        ({"PITR_VALIDATE_SQL": "SELECT 1", "AUTO_START": "false"}, "there is no server to check"),
    ):
        # A Pushgateway that is not there does not hold up anything.
        done = pitr("restore", settings={**settings, **change, "PITR_PUSHGATEWAY": "http://127.0.0.1:1"})
        assert done.returncode == 10, done.stderr
        assert told in done.stderr
        assert "metrics not pushed" in done.stderr
        assert not list((lab_directory / "restored").iterdir())
