"""The marker of a restore: it parses back, and only its own request may go on."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import booleans, builds, datetimes, dictionaries, integers, just, none, sampled_from, text

from agent.errors import ConfigError
from agent.restore.marker import (
    MARKER_NAME,
    MarkerStage,
    RestoreMarker,
    read_marker,
    require_same_request,
    restore_request,
    write_marker,
)
from agent.settings import load_settings

MOMENTS = datetimes(min_value=datetime(2000, 1, 1), timezones=just(UTC))  # noqa: DTZ001 - hypothesis adds the zone
MARKERS = builds(
    RestoreMarker,
    request=dictionaries(text(), text()),
    stage=sampled_from(MarkerStage),
    backup=text(),
    timeline=integers(1, 2**32 - 1),
    target=text(),
    first_segment=text(),
    last_segment=text(),
    to_the_end=booleans(),
    started_at=MOMENTS,
    finished_at=none() | MOMENTS,
    new_timeline=none() | integers(1, 2**32 - 1),
    last_commit_at=none() | MOMENTS,
    failure=none() | text(),
    note=text(),
    prepared_transactions=none() | integers(0, 100),
    system_identifier=none() | integers(1, 2**64 - 1),
)
ENVIRONMENT = {"WALG_S3_PREFIX": "s3://bucket/path", "PGDATA": "/data", "TARGET_TIME": "2026-11-22T19:53:41Z"}


def request_of(**changes: str) -> Mapping[str, str]:
    return restore_request(load_settings(ENVIRONMENT | changes))


@given(marker=MARKERS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_marker_reads_back_as_it_was_written(tmp_path: Path, marker: RestoreMarker) -> None:
    write_marker(tmp_path, marker)
    assert read_marker(tmp_path) == marker


def test_a_directory_without_a_marker_has_none(tmp_path: Path) -> None:
    assert read_marker(tmp_path) is None
    assert read_marker(tmp_path / "absent") is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"stage": "hydrated"}', "\x00" * 4096])
def test_a_damaged_marker_is_refused_and_not_taken_for_an_empty_directory(tmp_path: Path, content: str) -> None:
    (tmp_path / MARKER_NAME).write_text(content)
    with pytest.raises(ConfigError, match=MARKER_NAME):
        read_marker(tmp_path)


def test_a_request_is_the_same_whether_or_not_it_starts_postgresql() -> None:
    assert request_of() == request_of(AUTO_START="true")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"TARGET_TIME": "2026-11-22T19:53:42Z"}, "target"),
        ({"TARGET_TIME": "", "TARGET_LSN": "0/1000000"}, "target"),
        ({"TARGET_INCLUSIVE": "false"}, "target"),
        ({"TARGET_TIMELINE": "2"}, "target_timeline"),
        ({"BACKUP_NAME": "base_000000010000000000000009"}, "backup_name"),
        ({"WALG_S3_PREFIX": "s3://bucket/other"}, "repository"),
        ({"PITR_TABLESPACE_MAP": "/a=/b"}, "tablespace_map"),
        ({"PITR_ARCHIVE_AFTER_RESTORE": "true"}, "archive_after_restore"),
    ],
)
def test_another_request_is_refused_naming_what_differs(changes: dict[str, str], name: str) -> None:
    marker = RestoreMarker(
        request=request_of(),
        stage=MarkerStage.PROMOTED,
        backup="base_000000010000000000000009",
        timeline=1,
        target="",
        first_segment="000000010000000000000009",
        last_segment="000000010000000000000009",
        to_the_end=False,
        started_at=datetime(2026, 11, 22, tzinfo=UTC),
    )
    require_same_request(marker, request_of(), Path("/data"))
    with pytest.raises(ConfigError, match=f"its {name} was"):
        require_same_request(marker, request_of(**changes), Path("/data"))
