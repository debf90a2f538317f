"""Which files come from which base backup of a chain.

A delta holds files whole, increments of files, and mentions unchanged ones ("skipped"). So what is wanted of a parent
is what its child, as far as that is itself wanted, has as an increment or skipped: files dropped since never appear,
and a file that a later delta holds whole is not taken from its parents. Source: WAL-G's backup_fetch_handler.go.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from agent.errors import RepositoryCorrupt
from agent.repository.backups import FilesMetadata

CONTROL_FILE = "global/pg_control"
LABEL_FILE = "backup_label"
MAP_FILE = "tablespace_map"
UTILITY_FILES = frozenset({CONTROL_FILE, LABEL_FILE, MAP_FILE})
"""Taken from the backup that is restored, never from its parents, whether they are listed or not."""


@dataclass(frozen=True, slots=True)
class WantedFiles:
    """What to take from one base backup. Names are paths below the data directory, which is itself the empty name.

    names: the files and directories to unpack; None: all there are.
    increments: those of them that are increments of the file from the parents.
    is_target: this is the backup that is restored, not one that it builds on.
    """

    backup: str
    names: frozenset[str] | None
    increments: frozenset[str]
    is_target: bool


def path_below(name: str, source: str) -> str:
    """Turn the name of a tar member into a path below the data directory, empty for that itself.

    Local backups of WAL-G begin names with a slash, those taken through the replication protocol with nothing or `./`.

    Raises:
        RepositoryCorrupt: It leads elsewhere.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in name:
        raise RepositoryCorrupt(
            f"{source} holds a file with the name {name[:200]!r}",
            hint="No base backup holds such a name: the object was made to write elsewhere. Find out who stored it.",
        )
    return "/".join(parts)


def wanted_files(chain: Sequence[tuple[str, FilesMetadata | None]]) -> list[WantedFiles]:
    """Decide what to take from each base backup of `chain`: names and file lists, the full one first.

    Raises:
        RepositoryCorrupt: The lists of a delta and its parents do not fit together.
    """
    target, listed = chain[-1]
    if listed is None or not listed.files:
        if len(chain) > 1:
            raise RepositoryCorrupt(
                f"base backup {target} is a delta, but its list of files is missing",
                hint="Bring back its files_metadata.json, or use another backup.",
            )
        return [WantedFiles(target, None, frozenset(), is_target=True)]
    result: list[WantedFiles] = []
    wanted = {path_below(name, target) for name in listed.files}
    for backup, metadata in reversed(chain):
        taken = _taken_from(backup, metadata, wanted, is_target=backup == target)
        result.insert(0, taken)
        wanted = (wanted - (taken.names or frozenset())) | taken.increments
    if wanted:
        raise RepositoryCorrupt(
            f"base backup {chain[0][0]} is a full one, but does not hold {min(wanted)}", hint="Use another backup."
        )
    return result


def _taken_from(backup: str, metadata: FilesMetadata | None, wanted: set[str], *, is_target: bool) -> WantedFiles:
    if metadata is None or not metadata.files:  # a full one that came without a list: all that is wanted is in it
        return WantedFiles(backup, frozenset(wanted), frozenset(), is_target)
    described = {path_below(name, backup): description for name, description in metadata.files.items()}
    unknown = wanted - described.keys()
    if unknown:
        raise RepositoryCorrupt(
            f"base backup {backup} does not list {min(unknown)}, which a delta on top of it builds on",
            hint="Use another backup.",
        )
    return WantedFiles(
        backup,
        frozenset(name for name in wanted if not described[name].is_skipped),
        frozenset(name for name in wanted if described[name].is_incremented),
        is_target,
    )
