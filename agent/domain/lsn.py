"""Positions in the WAL stream: `int` inside, `X/X` text at the edges."""

import re

_LSN = re.compile(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})")


def parse_lsn(text: str) -> int:
    """Read PostgreSQL's `X/X` text form of an LSN.

    Raises:
        ValueError: `text` is not two groups of 1 to 8 hex digits around a slash.

    Source: pg_lsn_in_internal() in PostgreSQL's src/backend/utils/adt/pg_lsn.c.
    """
    match = _LSN.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not an LSN such as 16/B374D848")
    high, low = match.groups()
    return int(high, 16) << 32 | int(low, 16)


def format_lsn(lsn: int) -> str:
    """Write an LSN (0 to 2**64 - 1) the way PostgreSQL prints it: `16/B374D848`."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"
