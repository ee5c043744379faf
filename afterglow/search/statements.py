"""Every statement of the search index in Postgres. The tables are in `sql/`; a file's number and its index in the file
make the number of a chunk, see `pieces.py`."""

from __future__ import annotations

# Tables with rows of files, and the column that has their chunks' numbers.
KEYS = {
    "search_words": "first",
    "search_vectors": "number",
    "search_packed_vectors": "first",
    "search_chunks": "number",
}
TABLES = (*KEYS, "search_files")
READ = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
WRITE = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE"  # the store's row is the lock

HAS_VECTORS = "SELECT to_regclass('search_vectors') IS NOT NULL"
CREATE_STORE = """
    INSERT INTO search_stores (project, id, format) VALUES ($1, $2, $3)
    ON CONFLICT (id) DO UPDATE SET project = excluded.project WHERE search_stores.project = excluded.project
    RETURNING number, id, format, dimensions"""
LOCK_STORE = "SELECT number, id, format, dimensions FROM search_stores WHERE project = $1 AND id = $2 FOR UPDATE"
COUNT_IN = """
    UPDATE search_stores SET format = $2, dimensions = $3, chunks = chunks + $4, words = words + $5,
        vectors = vectors + $6
    WHERE number = $1"""
COUNT_OUT = """
    UPDATE search_stores SET chunks = chunks - $2, words = words - $3, vectors = vectors - $4,
        dimensions = CASE WHEN vectors > $4 THEN dimensions END
    WHERE number = $1 RETURNING dimensions"""
CREATE_FILE = """
    INSERT INTO search_files (store, id, format, attributes, usage_bytes, chunks, words, vectors)
    VALUES ($1, $2, $3, $4, $5, $6, 0, $7) RETURNING number"""
SET_WORDS = "UPDATE search_files SET words = $2, format = $3 WHERE number = $1"
DELETE_FILE = "DELETE FROM search_files WHERE store = $1 AND id = $2 RETURNING number, chunks, words, vectors"
SET_ATTRIBUTES = """
    UPDATE search_files f SET attributes = $4 FROM search_stores s
    WHERE s.project = $1 AND s.id = $2 AND f.store = s.number AND f.id = $3"""
DELETE_STORE = """
    WITH gone AS (DELETE FROM search_stores WHERE project = $1 AND id = $2 RETURNING number)
    INSERT INTO search_deleted SELECT number FROM gone"""
OLD_FILE = "SELECT number, words FROM search_files WHERE store = $1 AND format <> $2 ORDER BY number LIMIT 1"

SET_FORMAT = "UPDATE search_stores SET format = $2 WHERE number = $1"
ADD_WORDS = "UPDATE search_stores SET words = words + $2 WHERE number = $1"
PACK_VECTORS = "INSERT INTO search_packed_vectors (first, store, dimensions, vectors) VALUES ($1, $2, $3, $4)"
TAKE_PACKED_VECTORS = """
    DELETE FROM search_packed_vectors
    WHERE first = (SELECT first FROM search_packed_vectors LIMIT 1 FOR UPDATE SKIP LOCKED) RETURNING *"""
DELETED_STORES = "SELECT store FROM search_deleted"
CLAIM_DELETED_STORE = "SELECT 1 FROM search_deleted WHERE store = $1 FOR UPDATE SKIP LOCKED"
FORGET_DELETED_STORE = "DELETE FROM search_deleted WHERE store = $1"


def delete_of_file(table: str) -> str:
    """Of a file whose chunks have numbers from $1 to $2."""
    return f"DELETE FROM {table} WHERE {KEYS[table]} BETWEEN $1 AND $2"  # noqa: S608  our names


def delete_some_of_store(table: str) -> str:
    """Up to $2 rows."""
    return f"DELETE FROM {table} WHERE ctid = ANY(ARRAY(SELECT ctid FROM {table} WHERE store = $1 LIMIT $2))"  # noqa: S608


STORES = "SELECT number, id, dimensions, chunks, words FROM search_stores WHERE project = $1 AND id = ANY($2::text[])"
FILES = "SELECT number, attributes FROM search_files WHERE store = ANY($1::bigint[])"
# A frequent word may not be worth its bytes; of the others they come at once.
WORDS = """
    SELECT term, sum(octet_length(places)) AS size,
        CASE WHEN sum(octet_length(places)) <= $3 THEN string_agg(places, '') END AS places
    FROM search_words WHERE store = ANY($1::bigint[]) AND term = ANY($2::text[]) GROUP BY term"""
PREFIX = """
    SELECT string_agg(places, '') FROM search_words
    WHERE store = ANY($1::bigint[]) AND term >= $2 AND term < $2 || chr(1114111)"""
OFFSETS = """
    SELECT term, string_agg(places, '' ORDER BY first) AS places, string_agg(offsets, '' ORDER BY first) AS offsets
    FROM search_words WHERE store = ANY($1::bigint[]) AND term = ANY($2::text[]) GROUP BY term"""
# A SELECT of its own is run once; else the text would be read anew for each row, and the files gone through one by one.
NEAREST = """
    SELECT number, embedding <#> (SELECT $2::text::halfvec) AS opposite FROM search_vectors
    WHERE store = ANY($1::bigint[]) AND ($3::bigint[] IS NULL OR number >> 24 IN (SELECT unnest($3::bigint[])))
    ORDER BY opposite, number LIMIT $4"""
CHUNKS = """
    SELECT c.number, c.start, c.stop, c.page, c.tokens, s.id AS store_id, f.id AS file_id,
        (SELECT string_agg(p.piece, '' ORDER BY p.number) FROM search_chunks p
         WHERE p.number BETWEEN c.number AND c.number + c.reach) AS text
    FROM search_chunks c JOIN search_files f ON f.number = c.number >> 24 JOIN search_stores s ON s.number = c.store"""
HITS = f"{CHUNKS} WHERE c.number = ANY($1::bigint[])"
FILE_CHUNKS = f"{CHUNKS} WHERE c.number BETWEEN $1 AND $2 ORDER BY c.number LIMIT $3"
FILE = """
    SELECT f.number FROM search_stores s JOIN search_files f ON f.store = s.number
    WHERE s.project = $1 AND s.id = $2 AND f.id = $3"""
PIECES = "SELECT piece FROM search_chunks WHERE number BETWEEN $1 AND $2 ORDER BY number"
FILE_ROW = """
    SELECT f.number, f.attributes, s.dimensions FROM search_stores s JOIN search_files f ON f.store = s.number
    WHERE s.project = $1 AND s.id = $2 AND f.id = $3"""
PACKED_VECTORS = "SELECT vectors FROM search_packed_vectors WHERE first BETWEEN $1 AND $2 ORDER BY first"
VECTORS = "SELECT halfvec_send(embedding) FROM search_vectors WHERE number BETWEEN $1 AND $2 ORDER BY number"
USAGE = """
    SELECT coalesce(sum(f.usage_bytes), 0)::bigint FROM search_stores s JOIN search_files f ON f.store = s.number
    WHERE s.project = $1 AND s.id = $2"""
