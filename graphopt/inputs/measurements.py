"""What was measured on this machine, kept on disk: an SQLite file under the user's cache folder."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphopt.inputs.database import Database, cache_folder

FILE_NAME = "measurements.sqlite3"
_MOST = 10_000
"""How many are kept; what was written first goes first."""
_TABLE = "CREATE TABLE IF NOT EXISTS measurements (key TEXT PRIMARY KEY, kind TEXT, written REAL, value TEXT)"


class Measurements:
    """Plain data by key. The key holds all that a measurement depends on, so that nothing is ever invalidated.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> measurements = Measurements(Path(folder.name))
        >>> measurements.write("some key", "example", {"ms": 2.5})
        >>> measurements.read("some key"), measurements.read("another key")
        ({'ms': 2.5}, None)
        >>> folder.cleanup()
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Name a file in `folder`, `graphopt.inputs.database.cache_folder` where None; nothing is opened yet."""
        self._database = Database((folder or cache_folder()) / FILE_NAME, _TABLE, "measurements")

    @property
    def notes(self) -> list[str]:
        """What went wrong with the file, one sentence each."""
        return self._database.notes

    def read(self, key: str) -> Any:
        """What was kept under a key, None where there is nothing that can be read."""
        with self._database.reading() as database:
            if database is not None:
                row = database.execute("SELECT value FROM measurements WHERE key = ?", (key,)).fetchone()
                return None if row is None else json.loads(row[0])
        return None

    def write(self, key: str, kind: str, value: Any) -> None:
        """Keep plain data under a key, in place of what was there."""
        self.write_all({key: value}, kind)

    def read_all(self, kind: str) -> dict[str, Any]:
        """Everything that was kept as of one kind, by key; what cannot be read is left out."""
        with self._database.reading() as database:
            if database is not None:
                rows = database.execute("SELECT key, value FROM measurements WHERE kind = ?", (kind,)).fetchall()
                return {key: json.loads(value) for key, value in rows}
        return {}

    def write_all(self, values: Mapping[str, Any], kind: str) -> None:
        """Keep plain data under several keys at once, in place of what was there."""
        rows = [(key, kind, time.time(), json.dumps(value)) for key, value in values.items()]
        newest = "SELECT key FROM measurements ORDER BY written DESC LIMIT ?"
        with self._database.writing() as database:
            if database is not None:
                database.executemany("INSERT OR REPLACE INTO measurements VALUES (?, ?, ?, ?)", rows)
                database.execute(f"DELETE FROM measurements WHERE key NOT IN ({newest})", (_MOST,))
