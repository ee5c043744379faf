"""How a text falls into tokens: as SQLite's FTS5 splits it, wherever the index is, so that all of them agree."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from typing import Any

MAX_TOKENS = 65_535  # of a text; the places of those after are not told
FTS5 = "tokenize=\"porter unicode61 remove_diacritics 2 categories 'L* N* Co Mn Mc'\""
# Texts of numbers, because making a Python object of each would take most of the time.
PLACES = """
    SELECT term, COUNT(*), group_concat(doc), group_concat(offset)
    FROM tokens WHERE offset < 65535 GROUP BY term"""


class Tokenizer:
    """A database in memory that splits words as FTS5 tables on disk do. Called from any thread, by one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self._connection.execute(f"CREATE VIRTUAL TABLE texts USING fts5(text, content='', {FTS5})")
        self._connection.execute("CREATE VIRTUAL TABLE tokens USING fts5vocab(texts, instance)")

    def split(self, pieces: Sequence[str]) -> dict[str, list[str]]:
        """The tokens of each piece, in order."""
        tokens: dict[str, list[str]] = {}
        for place, token in self._ask("SELECT doc, term FROM tokens ORDER BY doc, offset", pieces):
            tokens.setdefault(pieces[place], []).append(token)
        return tokens

    def places(self, texts: Sequence[str]) -> list[tuple[str, int, str, str]]:
        """Where each token stands: the token, how often, in which texts and at which place in each, as numbers with
        commas between."""
        return self._ask(PLACES, texts)

    def close(self) -> None:
        self._connection.close()

    def _ask(self, statement: str, texts: Sequence[str]) -> list[Any]:
        with self._lock:
            self._connection.execute("BEGIN")
            self._connection.executemany("INSERT INTO texts (rowid, text) VALUES (?, ?)", enumerate(texts))
            found = self._connection.execute(statement).fetchall()
            self._connection.execute("ROLLBACK")
            return found
