"""Statements for moving a whole database into another: what tables there are, whole rows of any of them, and how far a
move has come. Whoever moves is `afterglow/migrate.py`."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from afterglow.contracts import SqlRow, SqlValue, Transaction

Database = Literal["sqlite", "postgres"]
Kind = Literal["source", "bytes", "table", "blob", "store"]
Key = tuple[SqlValue, ...]
HERE_ALONE = {"migrations", "commits", "data_folders", "moves"}  # what they say is of the database that they are in
KINDS = {
    "INTEGER": "integer",
    "BIGINT": "integer",
    "DOUBLE PRECISION": "real",
    "TEXT": "text",
    "BLOB": "bytes",
    "BYTEA": "bytes",
}
# table, column, type, place in the primary key from 1
CATALOGUES: dict[Database, str] = {
    "sqlite": (
        "SELECT t.name, c.name, c.type, c.pk FROM sqlite_master t JOIN pragma_table_info(t.name) c"
        " WHERE t.type = 'table' AND t.name NOT LIKE 'sqlite%' ORDER BY t.rowid, c.cid"
    ),
    "postgres": (
        "SELECT t.relname::text, a.attname::text, format_type(a.atttypid, NULL),"
        " COALESCE(array_position(i.indkey::int2[], a.attnum) + 1, 0)"
        " FROM pg_class t JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped"
        " LEFT JOIN pg_index i ON i.indrelid = t.oid AND i.indisprimary"
        " WHERE t.relkind = 'r' AND t.relnamespace = current_schema()::regnamespace ORDER BY t.relname, a.attnum"
    ),
}


class Table(NamedTuple):
    """A table as its database describes it. columns: name and kind of each; key: the primary key's columns in order."""

    name: str
    columns: tuple[tuple[str, str], ...]
    key: tuple[str, ...]

    def has(self, column: str) -> bool:
        return any(name == column for name, _ in self.columns)

    def key_of(self, row: SqlRow) -> Key:
        return tuple(value for name in self.key for value in self.values([row], name))

    def values(self, rows: list[SqlRow], column: str) -> list[Any]:
        """What is in one column of whole rows."""
        at = [name for name, _ in self.columns].index(column)
        return [row[at] for row in rows]


async def list_tables(tx: Transaction, database: Database) -> list[Table]:
    """All tables that hold rows to be moved, and whatever else there is in the schema."""
    columns: dict[str, list[tuple[str, str]]] = {}
    keys: dict[str, dict[int, str]] = {}
    for table, column, type, place in await tx.fetch(CATALOGUES[database]):
        columns.setdefault(table, []).append((column, KINDS.get(type.upper(), str(type))))
        if place:
            keys.setdefault(table, {})[place] = column
    return [
        Table(name, tuple(columns[name]), tuple(column for _, column in sorted(keys.get(name, {}).items())))
        for name in columns
        if name not in HERE_ALONE
    ]


# --- rows of any table -----------------------------------------------------------------------------------------


async def count_rows(tx: Transaction, table: Table) -> int:
    return int((await tx.fetch(f"SELECT COUNT(*) FROM {table.name}"))[0][0])


async def is_empty(tx: Transaction, table: Table) -> bool:
    return not await tx.fetch(f"SELECT 1 FROM {table.name} LIMIT 1")


async def read_rows(tx: Transaction, table: Table, after: Key | None, up_to: Key | None, limit: int) -> list[SqlRow]:
    """Some rows in the order of their keys, which is each database's own."""
    conditions, values = [], list[SqlValue]()
    for sign, key in ((">", after), ("<=", up_to)):
        if key is not None:
            places = ", ".join(f"${len(values) + place}" for place in range(1, len(key) + 1))
            conditions.append(f"({', '.join(table.key)}) {sign} ({places})")
            values += key
    where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
    columns = ", ".join(name for name, _ in table.columns)
    order = ", ".join(table.key)
    rows = await tx.fetch(
        f"SELECT {columns} FROM {table.name}{where} ORDER BY {order} LIMIT ${len(values) + 1}", *values, limit
    )
    return [_converted(table, row) for row in rows]


def _converted(table: Table, row: SqlRow) -> SqlRow:
    """SQLite keeps what it was given, such as 1.5 in a column of integers; Postgres holds to the column's kind."""
    return tuple(
        int(value)
        if kind == "integer" and isinstance(value, float)
        else float(value)
        if kind == "real" and isinstance(value, int)
        else value
        for value, (_, kind) in zip(row, table.columns, strict=True)
    )


async def write_rows(tx: Transaction, table: Table, rows: list[SqlRow]) -> None:
    """Write rows, in the place of those that have their keys."""
    names = [name for name, _ in table.columns]
    width = len(names)
    lines = (f"({', '.join(f'${row * width + at + 1}' for at in range(width))})" for row in range(len(rows)))
    rest = [f"{name} = excluded.{name}" for name in names if name not in table.key]
    then = f"DO UPDATE SET {', '.join(rest)}" if rest else "DO NOTHING"
    await tx.execute(
        f"INSERT INTO {table.name} ({', '.join(names)}) VALUES {', '.join(lines)}"
        f" ON CONFLICT ({', '.join(table.key)}) {then}",
        *(value for row in rows for value in row),
    )


async def delete_rows(tx: Transaction, table: Table, limit: int) -> int:
    """Delete some rows, whichever; return how many."""
    key = ", ".join(table.key)
    return await tx.execute(
        f"DELETE FROM {table.name} WHERE ({key}) IN (SELECT {key} FROM {table.name} LIMIT $1)", limit
    )


# --- how far the move has come ---------------------------------------------------------------------------------


async def list_moves(tx: Transaction, kind: Kind) -> dict[str, str]:
    """Item and detail of each."""
    rows = await tx.fetch("SELECT item, detail FROM moves WHERE kind = $1 ORDER BY item", kind)
    return dict(rows)


async def list_moved(tx: Transaction, kind: Kind, items: list[str]) -> set[str]:
    """Which of these are noted."""
    if not items:
        return set()
    places = ", ".join(f"${number}" for number in range(2, len(items) + 2))
    rows = await tx.fetch(f"SELECT item FROM moves WHERE kind = $1 AND item IN ({places})", kind, *items)
    return {item for (item,) in rows}


async def note_move(tx: Transaction, kind: Kind, item: str, detail: str) -> None:
    await tx.execute(
        "INSERT INTO moves (kind, item, detail) VALUES ($1, $2, $3)"
        " ON CONFLICT (kind, item) DO UPDATE SET detail = excluded.detail",
        kind,
        item,
        detail,
    )


async def list_blobs_of_no_row(tx: Transaction, tables: list[Table]) -> list[str]:
    """Blobs that were moved, and that no row of these tables names any more."""
    named = " UNION ".join(f"SELECT blob FROM {table.name}" for table in tables)
    rows = await tx.fetch(
        f"SELECT m.item FROM moves m LEFT JOIN ({named}) n ON n.blob = m.item WHERE m.kind = 'blob' AND n.blob IS NULL"
    )
    return [item for (item,) in rows]


async def list_files_of_store(tx: Transaction, project: str, store_id: str) -> list[str]:
    rows = await tx.fetch(
        "SELECT id FROM vector_store_files WHERE project_id = $1 AND store_id = $2 ORDER BY id", project, store_id
    )
    return [file_id for (file_id,) in rows]


async def delete_move(tx: Transaction, kind: Kind, item: str) -> None:
    await tx.execute("DELETE FROM moves WHERE kind = $1 AND item = $2", kind, item)


async def note_place_of_bytes(tx: Transaction, place: str) -> None:
    """Where the target keeps the bytes of files. Those that were moved elsewhere before count for nothing."""
    if (await list_moves(tx, "bytes")).get("") != place:
        await tx.execute("DELETE FROM moves WHERE kind = 'blob'")
        await note_move(tx, "bytes", "", place)


async def delete_all_moves(tx: Transaction) -> None:
    await tx.execute("DELETE FROM moves")


async def unfinished_move(tx: Transaction) -> str | None:
    """Where from this database is being filled: until that is done, nothing may serve it."""
    rows = await tx.fetch("SELECT detail FROM moves WHERE kind = 'source'")
    return str(rows[0][0]) if rows else None


async def note_source(tx: Transaction, name: str) -> None:
    """There is one such row: of two moves that begin at once, one finds the other's."""
    await note_move(tx, "source", "", name)


# --- who is at work --------------------------------------------------------------------------------------------


async def count_leases(tx: Transaction, now: float) -> int:
    """Runs, and files of vector stores, that a worker holds."""
    rows = await tx.fetch(
        "SELECT (SELECT COUNT(*) FROM runs WHERE lease_until > $1)"
        " + (SELECT COUNT(*) FROM vector_store_files WHERE lease_until > $2)",
        now,
        now,
    )
    return int(rows[0][0])


async def count_processes(tx: Transaction) -> int:
    """Processes of ours that listen to this Postgres database."""
    rows = await tx.fetch(
        "SELECT COUNT(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'afterglow'"
    )
    return int(rows[0][0])
