"""The names of objects in a repository: where WAL-G puts what."""

from agent.domain.catalog import is_backup_name

WAL_FOLDER = "wal_005/"
BACKUP_FOLDER = "basebackups_005/"

_SENTINEL_ENDING = "_backup_stop_sentinel.json"


def wal_key(name: str, extension: str) -> str:
    """Key of the object that holds the WAL file `name` packed by the codec with `extension`."""
    return f"{WAL_FOLDER}{name}{extension}"


def sentinel_key(backup: str) -> str:
    """Key of the object whose presence makes the base backup exist."""
    return f"{BACKUP_FOLDER}{backup}{_SENTINEL_ENDING}"


def backup_name_of_sentinel(key: str) -> str | None:
    """Return the name of the base backup that `key` is the sentinel of, or None if it is no sentinel of ours.

    A sentinel of a foreign name is no base backup: WAL-G lists it, but none of its other commands accepts it.
    """
    if not (key.startswith(BACKUP_FOLDER) and key.endswith(_SENTINEL_ENDING)):
        return None
    name = key[len(BACKUP_FOLDER) : -len(_SENTINEL_ENDING)]
    return name if is_backup_name(name) else None


def backup_folder(backup: str) -> str:
    """Folder of all objects of a base backup but its sentinel."""
    return f"{BACKUP_FOLDER}{backup}/"


def tar_folder(backup: str) -> str:
    """Folder that holds the tars of a base backup, and must hold nothing else."""
    return f"{backup_folder(backup)}tar_partitions/"


def tar_part_name(number: int, extension: str) -> str:
    """Name the `number`th tar part (from 1) in the tar folder: `part_001.tar.zst`."""
    return f"part_{number:03d}.tar{extension}"


def metadata_key(backup: str) -> str:
    """Key of a base backup's `metadata.json`."""
    return f"{backup_folder(backup)}metadata.json"


def files_metadata_key(backup: str) -> str:
    """Key of a base backup's `files_metadata.json`."""
    return f"{backup_folder(backup)}files_metadata.json"


def manifest_key(backup: str) -> str:
    """Key of PostgreSQL's backup manifest of a base backup; WAL-G has no such object and does not mind it."""
    return f"{backup_folder(backup)}backup_manifest.zst"
