from datetime import UTC, datetime
from pathlib import Path

import pytest

from agent.domain.restore_target import TargetKind, format_time, parse_restore_target
from agent.errors import ConfigError
from agent.settings import Compression, Mode, load_settings
from agent.storage.connect import silence_seconds

BASE = {"WALG_FILE_PREFIX": "/backups"}
S3 = {"WALG_S3_PREFIX": "s3://bucket/a/b/", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "c4n4ry"}


def test_the_defaults_are_those_of_the_documentation() -> None:
    settings = load_settings(BASE)
    assert (settings.mode, settings.compression) == (Mode.ARCHIVE, Compression.ZSTD)
    assert (settings.http_host, settings.http_port) == ("0.0.0.0", 9108)
    assert settings.memory_limit == 256 << 20
    assert settings.target.kind is TargetKind.END_OF_WAL
    assert settings.file_prefix == Path("/backups")


def test_wal_gs_names_are_understood() -> None:
    s3 = load_settings(
        S3 | {"AWS_ENDPOINT": "minio:9000", "AWS_S3_FORCE_PATH_STYLE": "1", "WALG_STORAGE_PREFIX": "/x"}
    ).s3
    assert s3 is not None
    assert (s3.bucket, s3.prefix, s3.endpoint, s3.force_path_style) == ("bucket", "a/b/x", "https://minio:9000", True)


def test_no_secret_shows_in_the_settings() -> None:
    names = ("PGPASSWORD", "AWS_SESSION_TOKEN", "PITR_PRIMARY_CONNINFO")
    key = {"WALG_LIBSODIUM_KEY": "c4n4ry" * 5}
    settings = load_settings(S3 | key | dict.fromkeys(names, "c4n4ry"))
    assert "c4n4ry" not in repr(settings)
    assert settings.postgres.password is not None
    assert settings.postgres.password.reveal() == "c4n4ry"


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"PITR_MEMRY_LIMIT": "1GiB"}, "PITR_MEMRY_LIMIT"),
        ({"TARGET_TIMES": "2026-11-22T19:53:41Z"}, "TARGET_TIMES"),
        ({"PITR_HTTP_PORT": "9108", "POSTGRES_SERVICE_HOST": "10.0.0.11"}, "PITR_HTTP_PORT"),
        ({"PITR_MODE": "backup"}, "PITR_MODE"),
        ({"PITR_HTTP_LISTEN": "9108"}, "PITR_HTTP_LISTEN"),
        ({"PITR_MEMORY_LIMIT": "12 parsecs"}, "PITR_MEMORY_LIMIT"),
        ({"WALG_UPLOAD_CONCURRENCY": "0"}, "WALG_UPLOAD_CONCURRENCY"),
        ({"WALG_COMPRESSION_METHOD": "rar"}, "WALG_COMPRESSION_METHOD"),
        ({"AUTO_START": "perhaps"}, "AUTO_START"),
        ({"WALG_S3_PREFIX": "s3://b/p"}, "WALG_FILE_PREFIX"),
        ({"WALG_FILE_PREFIX": "", "WALG_S3_PREFIX": "http://b/p"}, "WALG_S3_PREFIX"),
        ({"WALG_FILE_PREFIX": "", "WALG_S3_PREFIX": "s3:///p"}, "WALG_S3_PREFIX"),
        ({"WALG_FILE_PREFIX": "", "WALG_S3_PREFIX": "s3://b/p?x"}, "WALG_S3_PREFIX"),
        ({"WALG_FILE_PREFIX": "", "WALG_S3_PREFIX": "s3://b/p#1"}, "WALG_S3_PREFIX"),
        ({"WALG_FILE_PREFIX": ""}, "repository"),
        ({"PITR_TABLESPACE_MAP": "/a=b"}, "PITR_TABLESPACE_MAP"),
        ({"TARGET_TIME": "yesterday"}, "TARGET_TIME"),
        ({"TARGET_TIME": "2026-11-22T19:53:41"}, "time zone"),
        ({"TARGET_TIME": "2026-11-22"}, "2026-11-22T00:00:00Z"),
        ({"TARGET_LSN": "12"}, "TARGET_LSN"),
        ({"TARGET_XID": "-1"}, "TARGET_XID"),
        ({"BACKUP_NAME": "../etc"}, "BACKUP_NAME"),
        ({"TARGET_NAME": "a\nb"}, "TARGET_NAME"),
        ({"TARGET_NAME": "a", "TARGET_XID": "7"}, "more than one target"),
        ({"TARGET_TIMELINE": "newest"}, "TARGET_TIMELINE"),
        ({"TARGET_TIMELINE": "\u00b2"}, "TARGET_TIMELINE"),
        ({"TARGET_XID": "\u00b2"}, "TARGET_XID"),
        ({"PGPORT": "\u00b2"}, "PGPORT"),
        ({"PITR_HTTP_LISTEN": ":\u00b2"}, "PITR_HTTP_LISTEN"),
        ({"PITR_MEMORY_LIMIT": "\u00b2"}, "PITR_MEMORY_LIMIT"),
        ({"TARGET_TIME": "9999-12-31T23:59:59-01:00"}, "TARGET_TIME"),
        ({"TARGET_TIME": "0001-01-01T00:00:00+02:00"}, "TARGET_TIME"),
        ({"TARGET_NAME": "a\udcff"}, "TARGET_NAME"),
        ({"PITR_REQUEST_TIMEOUT": "soon"}, "PITR_REQUEST_TIMEOUT"),
        ({"WALG_FILE_PREFIX": "", "WALG_S3_PREFIX": "s3://[b/p"}, "WALG_S3_PREFIX"),
        ({"PITR_PUSHGATEWAY": "http://[::"}, "PITR_PUSHGATEWAY"),
    ],
)
def test_a_bad_setting_is_named_with_what_to_do(change: dict[str, str], names: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(BASE | change)
    assert names in caught.value.one_line()
    assert caught.value.hint


@pytest.mark.parametrize(
    "text", ["2026-11-22T19:53:41Z", "2026-11-22 20:53:41+01:00", "2026-11-22T19:53:41.000000+00:00"]
)
def test_a_time_is_read_with_its_zone(text: str) -> None:
    target = load_settings(BASE | {"TARGET_TIME": text}).target
    assert str(target) == "time 2026-11-22T19:53:41.000000Z"


def test_blanks_belong_to_a_password_and_to_the_name_of_a_restore_point() -> None:
    settings = load_settings(BASE | {"PGPASSWORD": " lead", "TARGET_NAME": "point "})
    assert settings.postgres.password is not None
    assert settings.postgres.password.reveal() == " lead"
    assert settings.target.name == "point "
    unset = load_settings(BASE | {"PGPASSWORD": "", "TARGET_NAME": ""})
    assert (unset.postgres.password, unset.target.kind) == (None, TargetKind.END_OF_WAL)


@pytest.mark.parametrize("service", ["PITR", "PITR_STATUS", "TARGET"])
def test_what_kubernetes_sets_for_a_service_of_our_name_is_no_setting(service: str) -> None:
    links = ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_9108_TCP", "PORT_9108_TCP_PROTO")
    load_settings(BASE | {f"{service}_{link}": "tcp://10.0.0.11:9108" for link in links})


def test_the_year_of_a_time_is_written_with_four_digits() -> None:
    assert format_time(datetime(987, 1, 2, tzinfo=UTC)) == "0987-01-02T00:00:00.000000Z"


@pytest.mark.parametrize("name", ["AWS_ENDPOINT", "PITR_PUSHGATEWAY"])
@pytest.mark.parametrize("scheme", ["https://", ""])
def test_a_password_in_an_address_which_errors_would_tell_is_refused_and_not_told(name: str, scheme: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} ") as caught:
        load_settings(S3 | {name: f"{scheme}admin:c4n4ry@host:9000"})
    assert "c4n4ry" not in caught.value.one_line()


def test_one_half_of_the_credentials_is_refused() -> None:
    with pytest.raises(ConfigError, match="only one of"):
        load_settings({"WALG_S3_PREFIX": "s3://b/p", "AWS_ACCESS_KEY_ID": "key"})


@pytest.mark.parametrize(
    ("prefix", "bucket", "path"),
    [
        ("s3://b", "b", ""),
        ("s3://b//", "b", ""),
        ("s3://b//p//", "b", "p"),
        ("s3://b/my%20cluster/a b", "b", "my cluster/a b"),
        ("s3://b/a%3Fb%23", "b", "a?b#"),
        ("S3://B.x/P", "B.x", "P"),
    ],
)
def test_a_prefix_is_read_as_wal_g_reads_it(prefix: str, bucket: str, path: str) -> None:
    s3 = load_settings({"WALG_S3_PREFIX": prefix}).s3
    assert s3 is not None
    assert (s3.bucket, s3.prefix) == (bucket, path)


def test_a_secret_in_the_prefix_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as refused:
        load_settings({"WALG_S3_PREFIX": "s3://key:c4n4ry@bucket/p"})
    assert "c4n4ry" not in refused.value.one_line()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"TARGET_XID": "743"}, "transaction 743"),
        ({"TARGET_XID": "743", "TARGET_INCLUSIVE": "false"}, "just before transaction 743"),
        (
            {"TARGET_TIME": "2026-11-22T19:53Z", "TARGET_INCLUSIVE": "false"},
            "just before time 2026-11-22T19:53:00.000000Z",
        ),
        ({"TARGET_NAME": "point", "TARGET_INCLUSIVE": "false"}, 'restore point "point"'),
    ],
)
def test_a_target_is_told_as_it_is_reached(settings: dict[str, str], told: str) -> None:
    assert str(parse_restore_target(settings)) == told


def test_whoever_waits_is_told_soon_of_a_store_that_says_nothing() -> None:
    settings = load_settings({"WALG_S3_PREFIX": "s3://b/p"})
    assert [silence_seconds(settings, seconds) for seconds in (None, 10, 60, 600)] == [60, 20, 60, 60]
    assert silence_seconds(load_settings({"WALG_S3_PREFIX": "s3://b/p", "PITR_STORE_TIMEOUT": "5"}), 10) == 5
