"""The settings of the agent: read once from the environment, checked, frozen.

WAL-G's and libpq's names are taken as they are; ours begin with `PITR_` or `TARGET_`. An unknown one is refused,
because a misspelt setting that is silently ignored is found out at the worst time; an unknown `WALG_` name is not,
because WAL-G has many that do not concern us. Nothing else in the agent reads the environment. How values are
written is in `agent.environment`.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from urllib.parse import unquote

from agent.domain.backup_schedule import BackupFrom, BackupSchedule, spread
from agent.domain.delta_parent import DeltaPolicy
from agent.domain.restore_target import TARGET_SETTINGS, RestoreTarget, parse_restore_target
from agent.domain.retention import RetentionPolicy, parse_retention
from agent.environment import (
    EVERY_ADDRESS,
    Environment,
    Secret,
    libsodium_key,
    parse_listen_address,
    parse_pushgateway,
    parse_schedule,
    parse_tablespace_map,
    parse_url,
)
from agent.errors import ConfigError


class Mode(StrEnum):
    """What `pitr agent` does."""

    ARCHIVE = "archive"
    RESTORE = "restore"


class RestoreAs(StrEnum):
    """What a restored server is to be."""

    PRIMARY = "primary"
    STANDBY = "standby"


class Compression(StrEnum):
    """Codecs that can be written; `repository/codecs.py` knows them and a few more for reading."""

    ZSTD = "zstd"
    LZ4 = "lz4"
    LZMA = "lzma"
    BROTLI = "brotli"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class S3Settings:
    """Where the bucket is and how to reach it.

    bucket, prefix: from `WALG_S3_PREFIX` = `s3://BUCKET/PATH` (and `WALG_STORAGE_PREFIX`, appended).
    endpoint: `AWS_ENDPOINT`; default: Amazon's own of the region.
    region: `AWS_REGION`; default us-east-1.
    force_path_style: `AWS_S3_FORCE_PATH_STYLE`; default false.
    access_key_id, secret_access_key, session_token: `AWS_...`; default: botocore's own chain (web identity, profile,
        instance).
    ca_file: `WALG_S3_CA_CERT_FILE`: CA bundle for the endpoint; default the system's.
    storage_class, sse, sse_kms_key_id: `WALG_S3_STORAGE_CLASS`, `WALG_S3_SSE`, `WALG_S3_SSE_KMS_ID`; default none.
    """

    bucket: str
    prefix: str
    endpoint: str | None
    region: str
    force_path_style: bool
    access_key_id: str | None
    secret_access_key: Secret[str] | None
    session_token: Secret[str] | None
    ca_file: Path | None
    storage_class: str | None
    sse: str | None
    sse_kms_key_id: str | None


@dataclass(frozen=True, slots=True)
class PostgresSettings:
    """How to reach PostgreSQL: libpq's `PGHOST` (default /var/run/postgresql), `PGPORT` (5432), `PGUSER` (postgres),
    `PGPASSWORD` (none), `PGDATABASE` (postgres)."""

    host: str
    port: int
    user: str
    password: Secret[str] | None
    database: str


@dataclass(frozen=True, slots=True)
class ValidationSettings:
    """What a restored server has to pass: `sql` is `PITR_VALIDATE_SQL` as given, queries or `@` and the path of a file;
    `amcheck` and `checksums` are named by `PITR_VALIDATE`; each of the three may take `timeout` seconds,
    `PITR_VALIDATE_TIMEOUT`, default 3600. It is false if nothing is asked for.
    """

    sql: str | None
    amcheck: bool
    checksums: bool
    timeout: float

    def __bool__(self) -> bool:
        return self.sql is not None or self.amcheck or self.checksums


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings. Sizes in bytes, times in seconds.

    mode: `PITR_MODE`, archive (default) or restore.
    socket: `PITR_SOCKET`, default /run/pitr/agent.sock: hooks and control API.
    http_host, http_port: `PITR_HTTP_LISTEN`, default 0.0.0.0:9108: metrics, health.
    s3: from `WALG_S3_PREFIX`, or None with
    file_prefix: `WALG_FILE_PREFIX`: a directory as repository.
    data_directory: `PGDATA`, None if unset (commands that only read the repository need none).
    postgres: how to reach the server.
    compression: `WALG_COMPRESSION_METHOD`, default zstd (level 1).
    libsodium_key: 32 bytes from `WALG_LIBSODIUM_KEY`, or else the file `WALG_LIBSODIUM_KEY_PATH`, by
        `WALG_LIBSODIUM_KEY_TRANSFORM`: none (default), hex or base64. Without it nothing is encrypted.
    upload_concurrency: `WALG_UPLOAD_CONCURRENCY`, default 16: most WAL files uploaded at once; the memory limit may
        allow fewer.
    upload_disk_concurrency: `WALG_UPLOAD_DISK_CONCURRENCY`, default 2: tar parts of a base backup packed at once.
    download_concurrency: `WALG_DOWNLOAD_CONCURRENCY`, default 10: tar parts restored at once.
    tar_size_threshold: `WALG_TAR_SIZE_THRESHOLD`, default 1 GiB - 1: a tar part is closed when it exceeds this.
    disk_rate_limit, network_rate_limit: `WALG_DISK_RATE_LIMIT`, `WALG_NETWORK_RATE_LIMIT`, default none: bytes a second
        that a base backup reads, and sends.
    backup_nice: `PITR_BACKUP_NICE`, default 0, up to 19: lowers the CPU and I/O priority of a base backup's threads.
    deltas: `WALG_DELTA_MAX_STEPS`, default 0: always full backups; `WALG_DELTA_ORIGIN`, LATEST (default) or
        LATEST_FULL; `WALG_DELTA_FROM_NAME`, default none: the newest.
    memory_limit: `PITR_MEMORY_LIMIT`, default 256MiB: buffers above the idle process.
    request_timeout: `PITR_REQUEST_TIMEOUT`, default 600: how long one request for WAL is retried against the store.
    store_timeout: `PITR_STORE_TIMEOUT`, default 60: a request on which the store is silent for so long is given up, and
        made again.
    backup_wal_timeout: `PITR_BACKUP_WAL_TIMEOUT`, default 3600: how long a backup waits for its WAL to be archived.
    retention: `PITR_RETENTION`, None if unset: nothing expires by itself.
    drain_timeout: `PITR_DRAIN_TIMEOUT`, default 90: how long the agent, told to end, goes on for a server that stops;
        see `agent/archive/drain.py`.
    backup_schedule: `PITR_BACKUP_SCHEDULE`, cron in UTC, default `0 2 * * *`, None if it is set and empty; delayed by a
        share of `PITR_BACKUP_JITTER` (default 300) that the repository's address decides.
    backup_from: `PITR_BACKUP_FROM`, primary (default) or standby: which server scheduled base backups are taken of.
    verify_schedule: `PITR_VERIFY_SCHEDULE`, default `0 5 * * *`: when the agent verifies the repository, as above.
    verify_bytes_per_day: `PITR_VERIFY_BYTES_PER_DAY`, default 10 GiB: how much of it the agent reads back a day.
    backup_name: `BACKUP_NAME`, default LATEST: the newest backup that reaches the target.
    target: `TARGET_TIME` and its like; none of them: the end of WAL.
    tablespace_map: `PITR_TABLESPACE_MAP`, `OLD=NEW,...` directories.
    auto_start: `AUTO_START`, default false: run PostgreSQL through replay and promotion, then stop it.
    restore_delta: `PITR_RESTORE_DELTA`, default false: restore over an existing data directory of the same database
        cluster, whose server is stopped; only files that differ are written.
    archive_after_restore: `PITR_ARCHIVE_AFTER_RESTORE`, default false: leave the restored server's archiving on.
    validation: what the restored server has to pass, see there; by default nothing.
    restore_as: `PITR_RESTORE_AS`, primary (default: promoted, archiving nowhere) or standby.
    primary_conninfo: `PITR_PRIMARY_CONNINFO`, how a restored standby reaches its primary; default none.
    pushgateway: `PITR_PUSHGATEWAY`, URL of the Pushgateway that a restore or a drill tells how it ended; default none.
    postgres_bin: `PITR_POSTGRES_BIN`, directory of postgres and pg_ctl for AUTO_START; default: found on PATH, then in
        /usr/lib/postgresql/<major>/bin.
    hook_directory: `PITR_HOOK_DIR`, directory of wal-archive.sh and wal-restore.sh as PostgreSQL sees it, default
        /usr/local/bin.
    log_level: `PITR_LOG_LEVEL`, debug, info (default), warning or error.
    is_drill: set by `pitr drill` alone: what is restored is a proof, and thrown away.
    """

    mode: Mode
    socket: Path
    http_host: str
    http_port: int
    s3: S3Settings | None
    file_prefix: Path | None
    data_directory: Path | None
    postgres: PostgresSettings
    compression: Compression
    libsodium_key: Secret[bytes] | None
    upload_concurrency: int
    upload_disk_concurrency: int
    download_concurrency: int
    tar_size_threshold: int
    disk_rate_limit: int | None
    network_rate_limit: int | None
    backup_nice: int
    deltas: DeltaPolicy
    memory_limit: int
    request_timeout: float
    store_timeout: float
    backup_wal_timeout: float
    retention: RetentionPolicy | None
    drain_timeout: float
    backup_schedule: BackupSchedule | None
    backup_from: BackupFrom
    verify_schedule: BackupSchedule | None
    verify_bytes_per_day: int
    backup_name: str
    target: RestoreTarget
    tablespace_map: Mapping[str, str]
    auto_start: bool
    restore_delta: bool
    archive_after_restore: bool
    validation: ValidationSettings
    restore_as: RestoreAs
    primary_conninfo: Secret[str] | None
    pushgateway: str | None
    postgres_bin: Path | None
    hook_directory: Path
    log_level: str
    is_drill: bool = False

    def require_data_directory(self) -> Path:
        """Return PGDATA, or raise `ConfigError` if it is not set."""
        if self.data_directory is None:
            raise ConfigError("PGDATA is not set", hint="Set PGDATA to PostgreSQL's data directory.")
        return self.data_directory

    @property
    def repository(self) -> str:
        """Where the repository is, for people: an address of S3 or a directory."""
        return str(self.file_prefix) if self.s3 is None else f"s3://{self.s3.bucket}/{self.s3.prefix}"


# Names of the environment that belong to us, for the check of unknown ones.
_OUR_NAMES = frozenset({
    "PITR_MODE", "PITR_SOCKET", "PITR_HTTP_LISTEN", "PITR_MEMORY_LIMIT", "PITR_REQUEST_TIMEOUT", "PITR_STORE_TIMEOUT",
    "PITR_BACKUP_WAL_TIMEOUT", "PITR_BACKUP_NICE", "PITR_BACKUP_SCHEDULE", "PITR_BACKUP_JITTER", "PITR_BACKUP_FROM",
    "PITR_VERIFY_SCHEDULE", "PITR_VERIFY_BYTES_PER_DAY", "PITR_RETENTION", "PITR_DRAIN_TIMEOUT",
    "PITR_TABLESPACE_MAP", "PITR_ARCHIVE_AFTER_RESTORE", "PITR_RESTORE_DELTA", "PITR_VALIDATE", "PITR_VALIDATE_SQL",
    "PITR_VALIDATE_TIMEOUT", "PITR_RESTORE_AS", "PITR_PRIMARY_CONNINFO", "PITR_PUSHGATEWAY", "PITR_POSTGRES_BIN",
    "PITR_HOOK_DIR", "PITR_LOG_LEVEL", "PITR_HOOK_TIMEOUT", *TARGET_SETTINGS,
})  # fmt: skip
# What Kubernetes sets in each container for a Service whose name begins as our settings do. Source: Kubernetes docs,
# "Discovering services".
_SERVICE_LINK = re.compile(r"(.+?)_(SERVICE_(HOST|PORT(_.+)?)|PORT(_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)")


def _bucket_and_path(prefix: str) -> tuple[str, str]:
    """Read `WALG_S3_PREFIX` as WAL-G does: it is a URL, so `%20` is a space. What WAL-G would pass over is refused."""
    parts = parse_url("WALG_S3_PREFIX", prefix)
    told = "" if "@" in prefix else f"={prefix!r}"  # before it may be a secret
    if parts.scheme != "s3" or not parts.netloc or "@" in parts.netloc:
        raise ConfigError(f"WALG_S3_PREFIX{told} is not of the form s3://BUCKET/PATH", hint="Correct WALG_S3_PREFIX.")
    if "?" in prefix or "#" in prefix:
        raise ConfigError(
            f"WALG_S3_PREFIX{told} has a ? or #, which ends the path of a URL",
            hint="Write %3F or %23 where it belongs to the path, or leave it away.",
        )
    return parts.netloc, unquote(parts.path)


def _s3_settings(env: Environment) -> S3Settings | None:
    prefix = env.text("WALG_S3_PREFIX", "WALE_S3_PREFIX")
    if prefix is None:
        return None
    bucket, path = _bucket_and_path(prefix)
    folders = [path.strip("/"), (env.text("WALG_STORAGE_PREFIX") or "").strip("/")]
    endpoint = env.text("AWS_ENDPOINT", "AWS_ENDPOINT_URL")
    if endpoint is not None and "://" not in endpoint:
        endpoint = f"https://{endpoint}"
    if endpoint is not None and "@" in endpoint:
        raise ConfigError(
            "AWS_ENDPOINT has a user name in it", hint="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead."
        )
    key_id = env.text("AWS_ACCESS_KEY_ID", "AWS_ACCESS_KEY")
    secret = env.secret("AWS_SECRET_ACCESS_KEY", "AWS_SECRET_KEY")
    if (key_id is None) != (secret is None):
        raise ConfigError(
            "only one of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY is set",
            hint="Set both, or neither to use the workload identity.",
        )
    return S3Settings(
        bucket=bucket,
        prefix="/".join(folder for folder in folders if folder),
        endpoint=endpoint,
        region=env.text("AWS_REGION", "AWS_DEFAULT_REGION") or "us-east-1",
        force_path_style=env.boolean("AWS_S3_FORCE_PATH_STYLE", default=False),
        access_key_id=key_id,
        secret_access_key=secret,
        session_token=env.secret("AWS_SESSION_TOKEN"),
        ca_file=env.path("WALG_S3_CA_CERT_FILE"),
        storage_class=env.text("WALG_S3_STORAGE_CLASS"),
        sse=env.text("WALG_S3_SSE"),
        sse_kms_key_id=env.text("WALG_S3_SSE_KMS_ID"),
    )


def _delta_policy(env: Environment) -> DeltaPolicy:
    origin = env.choice("WALG_DELTA_ORIGIN", "latest", ("latest", "latest_full"))
    name = env.text("WALG_DELTA_FROM_NAME")
    return DeltaPolicy(env.integer("WALG_DELTA_MAX_STEPS", 0, least=0), origin == "latest_full", name)


def _validation(env: Environment) -> ValidationSettings:
    asked = {word.strip().lower() for word in (env.text("PITR_VALIDATE") or "").split(",") if word.strip()}
    if unknown := sorted(asked - {"amcheck", "checksums"}):
        raise ConfigError(f"PITR_VALIDATE names {unknown[0]!r}", hint="It takes amcheck, checksums, or both.")
    sql, timeout = env.text("PITR_VALIDATE_SQL"), env.seconds("PITR_VALIDATE_TIMEOUT", 3600)
    return ValidationSettings(sql, "amcheck" in asked, "checksums" in asked, timeout)


def _backup_name(env: Environment) -> str:
    name = env.text("BACKUP_NAME") or "LATEST"
    if "/" in name:
        raise ConfigError(
            f"BACKUP_NAME={name!r} is no name of a base backup", hint="`pitr backup list` shows what there is."
        )
    return name


def _is_service_link(name: str, values: Mapping[str, str]) -> bool:
    link = _SERVICE_LINK.fullmatch(name)
    return link is not None and f"{link[1]}_SERVICE_HOST" in values


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Read and check the settings from `environ` (default: the process's environment).

    Raises:
        ConfigError: A setting is unknown, malformed, or contradicts another.
    """
    values = os.environ if environ is None else environ
    ours = {name for name in values if name.startswith(("PITR_", "TARGET_"))} - _OUR_NAMES
    if unknown := sorted(name for name in ours if not _is_service_link(name, values)):
        raise ConfigError(
            f"unknown setting {unknown[0]}", hint="Correct its name; docs/settings.md lists all settings."
        )
    env = Environment(values)
    s3, file_prefix = _s3_settings(env), env.path("WALG_FILE_PREFIX")
    if (s3 is None) == (file_prefix is None):
        raise ConfigError(
            "no repository is named" if s3 is None else "both WALG_S3_PREFIX and WALG_FILE_PREFIX are set",
            hint="Set WALG_S3_PREFIX=s3://BUCKET/PATH (or WALG_FILE_PREFIX=/directory), not both.",
        )
    password = env.untrimmed("PGPASSWORD")  # as libpq takes it
    retention = env.text("PITR_RETENTION")
    http_host, http_port = parse_listen_address(env.text("PITR_HTTP_LISTEN") or f"{EVERY_ADDRESS}:9108")
    jitter = timedelta(seconds=env.seconds("PITR_BACKUP_JITTER", 300, least=0))
    delay = spread(f"{s3.bucket}/{s3.prefix}" if s3 else str(file_prefix), jitter)
    return Settings(
        mode=Mode(env.choice("PITR_MODE", Mode.ARCHIVE, tuple(Mode))),
        socket=env.path("PITR_SOCKET") or Path("/run/pitr/agent.sock"),
        http_host=http_host,
        http_port=http_port,
        s3=s3,
        file_prefix=file_prefix,
        data_directory=env.path("PGDATA"),
        postgres=PostgresSettings(
            host=env.text("PGHOST") or "/var/run/postgresql",
            port=env.integer("PGPORT", 5432),
            user=env.text("PGUSER") or "postgres",
            password=None if password is None else Secret(password),
            database=env.text("PGDATABASE") or "postgres",
        ),
        compression=Compression(env.choice("WALG_COMPRESSION_METHOD", Compression.ZSTD, tuple(Compression))),
        libsodium_key=libsodium_key(env),
        upload_concurrency=env.integer("WALG_UPLOAD_CONCURRENCY", 16),
        upload_disk_concurrency=env.integer("WALG_UPLOAD_DISK_CONCURRENCY", 2),
        download_concurrency=env.integer("WALG_DOWNLOAD_CONCURRENCY", 10),
        tar_size_threshold=env.size("WALG_TAR_SIZE_THRESHOLD", (1 << 30) - 1),
        disk_rate_limit=env.rate("WALG_DISK_RATE_LIMIT"),
        network_rate_limit=env.rate("WALG_NETWORK_RATE_LIMIT"),
        backup_nice=env.integer("PITR_BACKUP_NICE", 0, least=0, most=19),
        deltas=_delta_policy(env),
        memory_limit=env.size("PITR_MEMORY_LIMIT", 256 << 20),
        request_timeout=env.seconds("PITR_REQUEST_TIMEOUT", 600),
        store_timeout=env.seconds("PITR_STORE_TIMEOUT", 60),
        backup_wal_timeout=env.seconds("PITR_BACKUP_WAL_TIMEOUT", 3600),
        retention=None if retention is None else parse_retention("PITR_RETENTION", retention),
        drain_timeout=env.seconds("PITR_DRAIN_TIMEOUT", 90),
        backup_schedule=parse_schedule("PITR_BACKUP_SCHEDULE", "0 2 * * *", values, delay),
        backup_from=BackupFrom(env.choice("PITR_BACKUP_FROM", BackupFrom.PRIMARY, tuple(BackupFrom))),
        verify_schedule=parse_schedule("PITR_VERIFY_SCHEDULE", "0 5 * * *", values, delay),
        verify_bytes_per_day=env.size("PITR_VERIFY_BYTES_PER_DAY", 10 << 30),
        backup_name=_backup_name(env),
        target=parse_restore_target(values),
        tablespace_map=parse_tablespace_map(env.text("PITR_TABLESPACE_MAP")),
        auto_start=env.boolean("AUTO_START", default=False),
        restore_delta=env.boolean("PITR_RESTORE_DELTA", default=False),
        archive_after_restore=env.boolean("PITR_ARCHIVE_AFTER_RESTORE", default=False),
        validation=_validation(env),
        restore_as=RestoreAs(env.choice("PITR_RESTORE_AS", RestoreAs.PRIMARY, tuple(RestoreAs))),
        primary_conninfo=env.secret("PITR_PRIMARY_CONNINFO"),
        pushgateway=parse_pushgateway(env.text("PITR_PUSHGATEWAY")),
        postgres_bin=env.path("PITR_POSTGRES_BIN"),
        hook_directory=env.path("PITR_HOOK_DIR") or Path("/usr/local/bin"),
        log_level=env.choice("PITR_LOG_LEVEL", "info", ("debug", "info", "warning", "error")),
    )
