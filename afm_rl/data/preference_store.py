"""Collected preferences of a run, in one SQLite file: what annotators said, by batch, and kept.

A batch (an iTeC round, a file) is written in one transaction, so that a kill leaves all of it or none; written again, it
replaces itself. Records are stored as the JSON of `afm_rl/data/records.py`.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from afm_rl.data.records import preference_from_json, preference_to_json
from afm_rl.types import Preference

_SCHEMA = """
CREATE TABLE IF NOT EXISTS preferences (
  batch TEXT NOT NULL, position INTEGER NOT NULL, source TEXT NOT NULL, record TEXT NOT NULL,
  PRIMARY KEY (batch, position)
)
"""


class PreferenceStore:
    """The file `preferences.sqlite` of a run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(self._connect()) as db, db:
            db.execute(_SCHEMA)

    def add(self, batch: str, preferences: Sequence[Preference]) -> None:
        """Write a batch, all or nothing; one of that name is replaced (a resumed round writes the same records again)."""
        rows = [(batch, i, p.source, json.dumps(preference_to_json(p))) for i, p in enumerate(preferences)]
        with closing(self._connect()) as db, db:
            db.execute("DELETE FROM preferences WHERE batch = ?", (batch,))
            db.executemany("INSERT INTO preferences VALUES (?, ?, ?, ?)", rows)

    def read(self, batches: Sequence[str]) -> list[Preference]:
        """The preferences of these batches, in the order given and written."""
        found: list[Preference] = []
        with closing(self._connect()) as db:
            for batch in batches:
                query = "SELECT record FROM preferences WHERE batch = ? ORDER BY position"
                found += [preference_from_json(json.loads(record)) for (record,) in db.execute(query, (batch,))]
        return found

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=30.0)
        db.execute("PRAGMA journal_mode=WAL")
        return db
