"""Whether text is sorted here as where the base backup was taken: indexes over it miss rows if it is not."""

import os


def local_libc() -> str | None:
    """Return the version of this machine's C library, as PostgreSQL names it; None if it is not glibc.

    Source: get_collation_actual_version() in PostgreSQL's pg_locale.c (18: pg_locale_libc.c).
    """
    try:
        told = os.confstr("CS_GNU_LIBC_VERSION")
    except (ValueError, OSError):
        return None
    return told.removeprefix("glibc ") if told else None


def other_libc(recorded: str | None, local: str | None) -> str | None:
    """Return a warning if text was sorted by the C library of version `recorded`, and `local` is another.

    Nothing is said where the base backup tells none: its server has no collation of a version, or WAL-G took it.
    """
    if recorded is None or recorded == local:
        return None
    here = f"glibc {local}" if local else "another C library"
    return (
        f"text was sorted by glibc {recorded}, here is {here}: indexes over it may miss rows; use the image of the "
        "source, or REINDEX DATABASE and ALTER DATABASE ... REFRESH COLLATION VERSION in each"
    )
