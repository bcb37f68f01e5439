"""SQLite files under the user's cache folder: what they hold was measured or made once, and can be again."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

FOLDER_VARIABLE = "GRAPHOPT_CACHE"
"""Environment variable that names another folder than the user's cache folder."""
_PATIENCE_SECONDS = 5.0
"""How long to wait for another process that writes."""
_FAILURES = (sqlite3.Error, OSError, ValueError, EOFError)
"""What a disk, or what lies on it, may do."""


def cache_folder() -> Path:
    """Where caches lie: `$GRAPHOPT_CACHE`, else the user's cache folder for graphopt."""
    stated = os.environ.get(FOLDER_VARIABLE)
    return Path(stated).expanduser() if stated else Path(platformdirs.user_cache_dir("graphopt"))


class Database:
    """One file with one table. A file that is damaged, locked or full costs the saving, never the run: see `notes`.

    Several processes may use it at once. A file that is no database is put aside with the suffix `.damaged`.

    Attributes:
        path: the file.
        notes: what went wrong, one sentence each.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> database = Database(Path(folder.name) / "a.sqlite3", "CREATE TABLE IF NOT EXISTS t (n INTEGER)", "numbers")
        >>> with database.reading() as connection:
        ...     connection is None
        True
        >>> with database.writing() as connection:
        ...     _ = connection.execute("INSERT INTO t VALUES (3)")
        >>> with database.reading() as connection:
        ...     connection.execute("SELECT n FROM t").fetchall()
        [(3,)]
        >>> folder.cleanup()
    """

    def __init__(self, path: Path, table: str, what: str) -> None:
        """Name a file; nothing is opened yet.

        Args:
            path: the file; its folder is made when something is written.
            table: the SQL that makes the table where there is none.
            what: what is kept, for the notes.
        """
        self.path, self.notes = path, list[str]()
        self._table, self._what = table, what

    @contextmanager
    def reading(self) -> Generator[sqlite3.Connection | None, None, None]:
        """The open file, None where there is none that can be read. What goes wrong inside becomes a note."""
        connection = self._connected("read") if self.path.is_file() else None
        with self._guarded(connection, "read"):
            yield connection

    @contextmanager
    def writing(self) -> Generator[sqlite3.Connection | None, None, None]:
        """The open file in a transaction, which ends with the block; None where nothing can be written.

        What goes wrong inside becomes a note.
        """
        connection = self._connected("written")
        with self._guarded(connection, "written"):
            if connection is not None:
                connection.execute("BEGIN IMMEDIATE")
            yield connection
            if connection is not None:
                connection.execute("COMMIT")

    def _connected(self, what: str) -> sqlite3.Connection | None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return self._open()
        except _FAILURES as error:
            self._failed(what, error)
            return None

    @contextmanager
    def _guarded(self, connection: sqlite3.Connection | None, what: str) -> Generator[None, None, None]:
        try:
            yield
        except _FAILURES as error:
            self._failed(what, error)
        finally:
            if connection is not None:
                connection.close()

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=_PATIENCE_SECONDS, isolation_level=None)
        try:
            connection.execute("PRAGMA auto_vacuum = FULL")  # the file shrinks when entries go; new files only
            connection.execute(self._table)
        except BaseException:
            connection.close()
            raise
        return connection

    def _failed(self, what: str, error: Exception) -> None:
        self.notes.append(f"the cache of {self._what} could not be {what}: {error}")
        damaged = isinstance(error, sqlite3.DatabaseError) and not isinstance(
            error, (sqlite3.OperationalError, sqlite3.IntegrityError, sqlite3.ProgrammingError)
        )
        if damaged:
            try:
                self.path.replace(self.path.with_name(self.path.name + ".damaged"))
            except OSError as refusal:
                self.notes.append(f"the damaged cache could not be put aside: {refusal}")
