"""What `pitr backup`, `verify` and `expire` print of a catalog."""

import json
import subprocess
import sys
from pathlib import Path
from shutil import copytree

import pytest

from agent.lab.agent_process import agent_environment, run_pitr
from tests.support.walg_buckets import BUCKETS, needs_walg_buckets

pytestmark = needs_walg_buckets
BUCKET = BUCKETS / "pg17-zstd-delta" / "bucket"


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_nothing_is_cut_off_however_narrow_the_terminal(columns: int) -> None:
    done = run_pitr("backup", "list", settings={"WALG_FILE_PREFIX": str(BUCKET), "COLUMNS": str(columns)})
    assert done.returncode == 0, done.stderr
    sentinels = (BUCKET / "basebackups_005").glob("*_backup_stop_sentinel.json")
    names = sorted(path.name.removesuffix("_backup_stop_sentinel.json") for path in sentinels)
    lines = done.stdout.splitlines()
    assert [line.split(" ")[0] for line in lines if line.startswith("base_")] == names
    assert "…" not in done.stdout
    assert done.stdout.count("delta") == sum("_D_" in name for name in names) > 0
    assert all(len(line.rstrip()) <= columns for line in lines)
    assert lines[0].startswith("name ") == (columns == 200)


@pytest.mark.parametrize("columns", [80, 200])
def test_corrupt_pages_are_told(tmp_path: Path, columns: int) -> None:
    copytree(BUCKET, tmp_path / "bucket")
    sentinel = min((tmp_path / "bucket" / "basebackups_005").glob("*_backup_stop_sentinel.json"))
    sentinel.write_text(json.dumps(json.loads(sentinel.read_text()) | {"PitrCorruptPages": 3}))
    settings = {"WALG_FILE_PREFIX": str(tmp_path / "bucket"), "COLUMNS": str(columns)}
    done = run_pitr("backup", "list", settings=settings)
    assert "full, 3 corrupt pages" in done.stdout, done.stderr


def test_nothing_but_json_is_printed_when_a_base_backup_is_deleted(tmp_path: Path) -> None:
    copytree(BUCKET, tmp_path / "bucket")
    sentinel = min((tmp_path / "bucket" / "basebackups_005").glob("*_backup_stop_sentinel.json"))
    name = sentinel.name.removesuffix("_backup_stop_sentinel.json")
    settings = {"WALG_FILE_PREFIX": str(tmp_path / "bucket")}
    command = [sys.executable, "-m", "agent", "backup", "delete", name, "--with-dependents", "--json"]
    done = subprocess.run(command, env=agent_environment(settings), capture_output=True, text=True, check=False)
    assert name in json.loads(done.stdout)["deleted"], done.stderr


@pytest.mark.parametrize("command", ["verify", "expire"])
def test_a_repository_without_base_backups_is_not_told_to_be_whole(tmp_path: Path, command: str) -> None:
    settings = {"WALG_FILE_PREFIX": str(tmp_path), "PITR_RETENTION": "14d"}
    done = run_pitr(command, settings=settings)
    assert "holds no base backup" in done.stdout, done.stderr
    assert "whole" not in done.stdout


@pytest.mark.parametrize("columns", [80, 200])
def test_why_a_base_backup_goes_is_told_in_a_line(columns: int) -> None:
    settings = {"WALG_FILE_PREFIX": str(BUCKET), "COLUMNS": str(columns), "PITR_RETENTION": "full=1"}
    done = run_pitr("expire", settings=settings)
    assert done.returncode == 0, done.stderr
    assert "one of the newest" in done.stdout or "the newest full backup" in done.stdout
    assert all(len(line.rstrip()) <= columns for line in done.stdout.splitlines())


def test_a_base_backup_is_shown_in_words() -> None:
    done = run_pitr("backup", "show", "LATEST", settings={"WALG_FILE_PREFIX": str(BUCKET)})
    shown = dict(line.split(maxsplit=2)[1:] for line in done.stdout.splitlines() if line.startswith("pg version"))
    assert shown == {"version": "17.10"}, done.stderr
    assert "permanent          no" in done.stdout
