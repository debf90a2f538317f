"""A private S3 server (SeaweedFS) on loopback, for the demo and the tests."""

import atexit
import itertools
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Self

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from agent.errors import ConfigError

_START_SECONDS = 60
_STOP_SECONDS = 60
# Below the ports that the kernel gives to outgoing connections, each process in a block of its own, and there one after
# the other: so that a stopped server finds its ports free again.
_PORTS = range(20000, 32000)
_BLOCK = 500
_SOCKETS = Path("/tmp")  # noqa: S108 - where SeaweedFS puts its unix sockets, whatever TMPDIR says
_ROLES = ("master", "volume", "filer", "s3", "admin")
_ACTIONS = ("Admin", "Read", "Write", "List", "Tagging")


def find_weed() -> Path:
    """Return the `weed` program: beside the running Python, else on PATH; `ConfigError` if there is none."""
    beside = Path(sys.executable).parent / "weed"
    found = beside if beside.exists() else shutil.which("weed")
    if found is None:
        raise ConfigError("the program weed is not installed", hint='Install "postgres-pitr[demo]".')
    return Path(found)


def free_ports(count: int) -> list[int]:
    """Return `count` different loopback ports that nothing listens on."""
    ports: list[int] = []
    for port in itertools.islice(_own_ports(), _BLOCK - 1):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise ConfigError(f"no {count} free ports among {_BLOCK} from {_PORTS.start} to {_PORTS.stop}")


@cache
def _own_ports() -> Iterator[int]:
    """Return the ports of a block that no other process has, again and again; its first stays bound to say so."""
    for number in range(len(_PORTS) // _BLOCK):
        first, *others = _PORTS[(os.getpid() + number) * _BLOCK % len(_PORTS) :][:_BLOCK]
        claim = socket.socket()
        try:
            claim.bind(("127.0.0.1", first))
        except OSError:
            claim.close()
        else:
            atexit.register(claim.close)
            return itertools.cycle(others)
    raise ConfigError(f"each block of {_BLOCK} ports from {_PORTS.start} to {_PORTS.stop} is another process's")


class SeaweedServer:
    """One SeaweedFS process with an S3 gateway; its data and its log (`weed.log`) are in `directory`.

    endpoint: URL of the S3 gateway. https_endpoint: the same over TLS, None without `certificate`.
    access_key, secret_key: may do everything. reader_access_key, reader_secret_key: may only read and list.

    The methods block; the server answers about a second after `start`. As a context manager it starts and stops.
    """

    def __init__(self, directory: Path, *, certificate: tuple[Path, Path] | None = None) -> None:
        """Prepare a server in `directory` (created); `certificate` is a pair of PEM files, certificate and key."""
        self.directory = directory.absolute()
        self.access_key, self.secret_key = "pitr", secrets.token_hex(16)
        self.reader_access_key, self.reader_secret_key = "reader", secrets.token_hex(16)
        self._certificate = certificate
        self._process: subprocess.Popen[bytes] | None = None
        self._choose_ports()

    def _choose_ports(self) -> None:
        ports = free_ports(2 * len(_ROLES) + 1)
        self._ports = dict(zip(_ROLES, ports, strict=False))
        self._grpc_ports = dict(zip(_ROLES, ports[len(_ROLES) :], strict=False))
        self._https_port = ports[-1]

    @property
    def pid(self) -> int | None:
        """The server's process id, or None if it does not run."""
        return self._process.pid if self._process is not None else None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports['s3']}"

    @property
    def https_endpoint(self) -> str | None:
        return f"https://127.0.0.1:{self._https_port}" if self._certificate else None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and return when it answers; after `stop`, on the same ports with the same data.

        Raises:
            ConfigError: It did not come up; the message has the end of its log.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "s3.json").write_text(json.dumps({"identities": self._identities()}))
        with (self.directory / "weed.log").open("ab") as log:
            self._process = subprocess.Popen(
                [find_weed(), "-logdir=.", "mini", *self._flags()],
                cwd=self.directory,
                env={**os.environ, "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"},  # one volume file a bucket, not seven
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C in the terminal is for us, we stop the server in order
            )
        self._wait_until_it_answers(self._process)

    def _identities(self) -> list[dict[str, Any]]:
        def identity(name: str, secret: str, actions: tuple[str, ...]) -> dict[str, Any]:
            return {"name": name, "credentials": [{"accessKey": name, "secretKey": secret}], "actions": actions}

        return [
            identity(self.access_key, self.secret_key, _ACTIONS),
            identity(self.reader_access_key, self.reader_secret_key, ("Read", "List")),
        ]

    def _flags(self) -> list[str]:
        flags = ["-dir=.", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-webdav=false", "-admin.ui=false"]
        flags += ["-master.telemetry=false", "-master.volumeSizeLimitMB=1024", "-volume.max=100"]
        flags += ["-s3.config=s3.json", "-s3.autoCreateBucket=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        for role in _ROLES:
            flags += [f"-{role}.port={self._ports[role]}", f"-{role}.port.grpc={self._grpc_ports[role]}"]
        if self._certificate:
            certificate, key = self._certificate
            flags += [f"-s3.port.https={self._https_port}", f"-s3.cert.file={certificate}", f"-s3.key.file={key}"]
        return flags

    def _wait_until_it_answers(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _START_SECONDS
        client = self._client()
        while time.monotonic() < deadline and process.poll() is None:
            try:
                client.list_buckets()
            except (BotoCoreError, ClientError):
                time.sleep(0.02)
            else:
                return
        self.stop()
        tail = (self.directory / "weed.log").read_text(errors="replace")[-1000:]
        raise ConfigError(f"SeaweedFS did not start in {self.directory}: {tail}")

    def stop(self) -> None:
        """End the server at once. What it acknowledged stays: its files are written, if not synced, before it answers.

        An orderly shutdown would take seconds and leave the same files.
        """
        if self._process is not None:
            self._process.kill()
            self._process.wait(_STOP_SECONDS)
            self._process = None
            for leftover in self.sockets():
                leftover.unlink(missing_ok=True)

    def sockets(self) -> list[Path]:
        """Return the unix sockets that the server made outside of `directory`, and does not remove."""
        ports = (*self._ports.values(), *self._grpc_ports.values())
        return [path for port in ports for path in _SOCKETS.glob(f"seaweedfs-*-{port}.sock")]

    def create_bucket(self, name: str) -> None:
        """Create the bucket `name`; it is no error if it exists."""
        client = self._client()
        try:
            client.create_bucket(Bucket=name)
        except (client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
            return

    def environment(self, bucket: str, prefix: str = "") -> dict[str, str]:
        """Return the settings of an agent whose repository is `prefix` in `bucket` on this server."""
        return {
            "WALG_S3_PREFIX": f"s3://{bucket}/{prefix}",
            "AWS_ENDPOINT": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_S3_FORCE_PATH_STYLE": "true",
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
        }

    def _client(self) -> Any:  # boto3 makes its clients' classes at run time
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}),
        )
