"""A writer that knows what the server owes it: ids 1, 2, 3 ..., each noted outside PGDATA once its COMMIT returned."""

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import psycopg

from agent.lab.postgres import PostgresCluster
from agent.lab.waiting import wait_until

_FILLER_BYTES = 2000
_PAUSE_SECONDS = 0.005  # a steady load of some 300 KiB/s, not all that the machine can do


class Ledger:
    """Writes rows while it is entered, through crashes of the server, and notes each in the fsynced file `path`.

    A row whose COMMIT was not answered because the server died may be there or not: the next session looks.
    """

    def __init__(self, cluster: PostgresCluster, path: Path) -> None:
        self._cluster = cluster
        self._path = path
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write, name="ledger")
        self._error: Exception | None = None
        self._last = 0

    def __enter__(self) -> Self:
        self._cluster.execute("CREATE TABLE IF NOT EXISTS ledger (id bigint PRIMARY KEY, filler text NOT NULL)")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Write no more; raise what ended the writer, if anything but the server's death did."""
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def noted(self) -> int:
        """Return the greatest id that is known to be committed, by the file: all up to it are."""
        return int(self._path.read_text().split()[-1]) if self._path.exists() and self._path.stat().st_size else 0

    def wait_for(self, rows: int, *, seconds: float = 60) -> None:
        """Return when `rows` more rows are noted."""
        wanted = self._last + rows
        wait_until(
            lambda: self._last >= wanted or self._error is not None, seconds=seconds, what=f"row {wanted} to be noted"
        )

    def require_all_in(self, cluster: PostgresCluster) -> None:
        """Fail unless `cluster` holds the rows 1 to n and no other, n the last noted one, or the one then under way."""
        rows, first, last = cluster.query("SELECT count(*), min(id), max(id) FROM ledger")[0]
        assert (rows, first) == (last, 1), "a row is missing, or there twice"
        assert last in (self.noted(), self.noted() + 1)

    def _write(self) -> None:
        try:
            with self._path.open("ab") as file:
                while not self._stop.is_set():
                    try:
                        self._write_until_server_dies(file.fileno())
                    except psycopg.OperationalError:
                        self._stop.wait(0.1)
        except Exception as error:  # noqa: BLE001 - raised where the test waits
            self._error = error

    def _write_until_server_dies(self, file: int) -> None:
        with self._cluster.connect() as session:
            row = session.execute("SELECT coalesce(max(id), 0) FROM ledger").fetchone()
            assert row is not None
            assert row[0] in (self._last, self._last + 1), f"the server lost rows from {row[0] + 1} to {self._last}"
            self._note(file, row[0])
            while not self._stop.wait(_PAUSE_SECONDS):
                # Random, so that compression leaves the segments as large as real ones.
                session.execute(
                    "INSERT INTO ledger VALUES (%s, %s)", [self._last + 1, os.urandom(_FILLER_BYTES // 2).hex()]
                )
                self._note(file, self._last + 1)

    def _note(self, file: int, last: int) -> None:
        os.write(file, f"{last}\n".encode())
        os.fsync(file)
        self._last = last
