"""What a drill restored is removed whole, and nothing else ever is."""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from agent.errors import ConfigError
from agent.postgres.durable import locked_directory
from agent.restore.drill import discard_drill, left_by_a_drill
from agent.restore.marker import MARKER_NAME, MarkerStage, RestoreMarker, restore_request, write_marker
from agent.settings import load_settings

NOW = datetime(2026, 11, 23, tzinfo=UTC)


@pytest.fixture
def drilled(tmp_path: Path) -> Path:
    """A directory that a drill has filled, with a tablespace beside it."""
    directory, space = tmp_path / "data", tmp_path / "data.tablespaces" / "16384"
    for path in (directory / "base", directory / "lost+found", space / "PG_18"):
        path.mkdir(parents=True)
    (directory / "base" / "1").touch()
    settings = replace(load_settings({"WALG_FILE_PREFIX": "/repository"}), is_drill=True)
    mark(directory, restore_request(replace(settings, tablespace_map={"/srv/fast,ssd=1": str(space)})))
    return directory


def mark(directory: Path, request: Mapping[str, str]) -> None:
    segment = "000000010000000000000002"
    marker = RestoreMarker(
        request, MarkerStage.PROMOTED, "base_x", 1, "", segment, segment, to_the_end=False, started_at=NOW
    )
    write_marker(directory, marker)


def left(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_all_of_a_drill_goes_with_its_tablespaces(drilled: Path) -> None:
    space = drilled.with_name("data.tablespaces") / "16384"
    discard_drill(drilled, left_by_a_drill(drilled))
    assert left(drilled) == {"lost+found"}
    assert left(space) == set()
    discard_drill(drilled, left_by_a_drill(drilled))  # nothing is there any more


def test_nothing_goes_where_a_server_runs_or_another_drill_is_at_work(drilled: Path) -> None:
    before = left(drilled) | {"postmaster.pid"}
    with subprocess.Popen([sys.executable, "-c", "input()"], cwd=drilled, stdin=subprocess.PIPE) as server:
        (drilled / "postmaster.pid").write_text(f"{server.pid}\n{drilled}\n")
        with pytest.raises(ConfigError, match=f"a PostgreSQL server runs in .* \\(process {server.pid}\\)"):
            discard_drill(drilled, {})
        server.kill()
    with locked_directory(drilled), pytest.raises(ConfigError, match="another drill is at work"):
        discard_drill(drilled, {})
    assert left(drilled) == before
    discard_drill(drilled, {})  # the killed server's postmaster.pid stands in nobody's way
    assert left(drilled) == {"lost+found"}


def test_nothing_goes_of_a_restore_that_is_no_drill_or_of_anybodys_files(drilled: Path) -> None:
    mark(drilled, {"target": "the end"})
    with pytest.raises(ConfigError, match="holds a restore that is no drill"):
        discard_drill(drilled, {})
    (drilled / MARKER_NAME).unlink()
    discard_drill(drilled, {})
    assert left(drilled) == {"base", "lost+found"}
