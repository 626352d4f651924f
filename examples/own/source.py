"""A source that reads a SQLite file: a table `pictures` with the columns `name`, `image`, `label`.

python main.py --config=folder --config.data.source=examples.own.source:SqliteSource \
    --config.data.path=FILE.db
"""

from __future__ import annotations

import sqlite3
import threading

import numpy as np

from byol_jax import UserError
from byol_jax.sources import Source
from byol_jax.sources.decode import decode


class SqliteSource(Source):
    """Pictures in a SQLite file; `image` has the bytes of a JPEG, PNG, WebP or BMP file."""

    def __init__(self, path: str, table: str = 'pictures', max_megapixels: float = 200.0):
        """Reads names and labels, but no picture.

        Args:
          path: path of the SQLite file.
          table: a table with the columns above; `label` is text, or null for no label.
          max_megapixels: larger pictures count as bad.

        Raises:
          UserError: the file does not exist or has no such table.
        """
        # Read-only mode, because a wrong path would otherwise create an empty file.
        self._uri = f'file:{path}?mode=ro'
        self._table, self._max_megapixels = table, max_megapixels
        self._local = threading.local()
        try:
            rows = self._connection.execute(f'SELECT rowid, name, label FROM "{table}"').fetchall()
        except sqlite3.Error as error:
            raise UserError(f'data.path={path}: {error}.') from error
        self._ids = [row[0] for row in rows]
        self._names = [row[1] for row in rows]
        found = [row[2] for row in rows]
        if None not in found:
            self.label_names = tuple(sorted(set(found)))
            self.labels = np.array([self.label_names.index(label) for label in found])

    def __len__(self) -> int:
        return len(self._ids)

    def name(self, index: int) -> str:
        return self._names[index]

    def load(self, index: int, key: str) -> np.ndarray:
        query = f'SELECT image FROM "{self._table}" WHERE rowid = ?'
        (data,) = self._connection.execute(query, (self._ids[index],)).fetchone()
        return decode(data, self.name(index), self._max_megapixels)

    @property
    def _connection(self) -> sqlite3.Connection:
        """This thread's connection: many threads load pictures, and cannot share one."""
        if not hasattr(self._local, 'connection'):
            self._local.connection = sqlite3.connect(self._uri, uri=True)
        return self._local.connection
