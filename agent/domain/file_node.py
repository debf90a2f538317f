"""Which file of a relation a WAL record is about: what PostgreSQL calls a relation file locator (before 16: node)."""

import struct
from typing import NamedTuple

FIRST_USER_NUMBER = 16384
"""Files below were made by initdb: system catalogs. Source: FirstNormalObjectId in PostgreSQL's access/transam.h."""

FILE_NODE = struct.Struct("<III")
"""As WAL holds it. Source: RelFileLocator in PostgreSQL's src/include/storage/relfilelocator.h."""


class FileNode(NamedTuple):
    """Tablespace, database (0: shared by all) and file number of a relation."""

    tablespace: int
    database: int
    number: int

    def __str__(self) -> str:
        return f"{self.database}/{self.number}"

    @property
    def is_catalog(self) -> bool:
        """Whether it is as initdb made it, a system catalog's."""
        return self.number < FIRST_USER_NUMBER
