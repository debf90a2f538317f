"""`pitr backup list` for people."""

import pytest

from agent.lab.agent_process import run_pitr
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
