"""Tablespaces of a restored data directory: where they go, and the links to them.

While a restore is at work a directory of a tablespace holds `pitr.tablespace`, which names the data directory: it shows
what an interrupted restore left there, and nothing but that is ever removed. Functions block for file I/O.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from agent.domain.backup_label import parse_tablespace_map
from agent.errors import ConfigError, RepositoryCorrupt
from agent.postgres.durable import fsync_directory, remove_durably, replace_durably
from agent.restore.wanted import MAP_FILE

CLAIM = "pitr.tablespace"
_LINKS = "pg_tblspc"
_NOBODYS = frozenset({"lost+found"})


def tablespace_directories(
    stored: Mapping[int, str], moved: Mapping[str, str], data_directory: Path
) -> dict[int, Path]:
    """Return the directory of each tablespace: where `moved` (old to new) says, else where it was.

    Raises:
        ConfigError: `moved` names a directory of no tablespace, or two tablespaces would share one, or lie in the data
            directory.
    """
    old = {location.rstrip("/") for location in stored.values()}
    if unknown := sorted(moved.keys() - old):
        raise ConfigError(
            f"PITR_TABLESPACE_MAP names {unknown[0]}, where this backup has no tablespace",
            hint=f"Its tablespaces were in {', '.join(sorted(old)) or 'no directory'}.",
        )
    result = {oid: Path(moved.get(location.rstrip("/"), location)) for oid, location in stored.items()}
    if len(set(result.values())) != len(result):
        raise _unusable("two tablespaces", "would share one directory")
    for directory in result.values():
        if directory.is_relative_to(data_directory):
            raise _unusable(str(directory), f"lies in the data directory {data_directory}")
    return result


def _unusable(directory: str, problem: str) -> ConfigError:
    return ConfigError(
        f"{directory} {problem}: no tablespace can be restored there",
        hint="Set PITR_TABLESPACE_MAP=OLD=NEW to restore it into another directory, or empty this one.",
    )


def version_prefix(pg_version: int) -> str:
    """Return how the name of the folder begins that is the server's in each of its tablespaces.

    Others beside it belong to other servers: pg_upgrade leaves that of its predecessor. 0, where a base backup does not
    tell its version, takes all of them. Source: GetDatabasePath() in PostgreSQL's relpath.c.
    """
    return f"PG_{pg_version // 10000}_" if pg_version else "PG_"


def make_tablespaces(
    directories: Mapping[int, Path], data_directory: Path, pg_version: int, *, keep: bool = False
) -> None:
    """Make each directory, empty, and the link to it in `data_directory`.

    With `keep` a directory may hold what an earlier run left, and what the data directory's own link led to; that
    stays. Tablespaces that are not among `directories` are given up: their links, and the server's folders in them.

    Raises:
        ConfigError: A directory cannot be made or written, or holds something.
    """
    links = data_directory / _LINKS
    links.mkdir(mode=0o700, exist_ok=True)
    found = {link.name: link.readlink() for link in links.iterdir() if link.is_symlink()}
    for oid, directory in directories.items():
        link = links / str(oid)
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _claim(directory, data_directory, keep=keep, is_linked=found.get(str(oid)) == directory)
        except OSError as error:
            raise _unusable(str(directory), f"cannot be used ({error.strerror})") from error
        if found.get(str(oid)) != directory:
            link.unlink(missing_ok=True)
            link.symlink_to(directory)
    for name in found.keys() - set(map(str, directories)):
        for folder in (links / name).glob(f"{version_prefix(pg_version)}*"):
            remove_tree(folder)
        (links / name).unlink()


def _claim(directory: Path, data_directory: Path, *, keep: bool, is_linked: bool) -> None:
    """Claim `directory`; remove what an interrupted restore of `data_directory` left, unless that is kept."""
    claim = directory / CLAIM
    found = {entry.name for entry in directory.iterdir()} - _NOBODYS
    is_ours = claim.is_file() and claim.read_text() == f"{data_directory}\n"
    if found and not is_ours and not (keep and is_linked):
        raise _unusable(str(directory), f"is not empty, it holds {min(found)}")
    replace_durably(claim, f"{data_directory}\n".encode())
    for name in found - {CLAIM} if not keep else ():
        remove_tree(directory / name)


def is_linked(directory: Path, data_directory: Path) -> bool:
    """Tell whether `directory` is that of a tablespace in `data_directory`, by its own link."""
    links = data_directory / _LINKS
    return links.is_dir() and any(link.is_symlink() and link.readlink() == directory for link in links.iterdir())


def remove_tree(path: Path) -> None:
    """Remove a file, a link (not what it leads to), or a directory with all below it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_tablespace_map(directories: Mapping[int, Path], data_directory: Path) -> None:
    """Make `tablespace_map`, from which PostgreSQL makes the links anew, say what the links say; drop an empty one.

    Raises:
        RepositoryCorrupt: It names a tablespace that the sentinel does not.
    """
    path = data_directory / MAP_FILE
    if not path.exists():
        return
    mapped = parse_tablespace_map(os.fsdecode(path.read_bytes()))
    if unknown := sorted(mapped.keys() - directories.keys()):
        raise RepositoryCorrupt(
            f"tablespace_map names the tablespace {unknown[0]}, but the base backup's sentinel does not",
            hint="Use another backup.",
        )
    if not mapped:
        remove_durably(path)
        return
    lines = [f"{oid} {_escaped(str(directories[oid]))}\n" for oid in sorted(mapped)]
    replace_durably(path, os.fsencode("".join(lines)))


def _escaped(path: str) -> str:
    """Source: do_pg_backup_start() in PostgreSQL's xlog.c."""
    return "".join(f"\\{character}" if character in "\n\r\\" else character for character in path)


def release_tablespaces(data_directory: Path) -> None:
    """Remove the claims from the directories that the links in `data_directory` lead to; durable on return."""
    for link in (data_directory / _LINKS).iterdir():
        if link.is_symlink():
            (link / CLAIM).unlink(missing_ok=True)
            fsync_directory(link)
