-- The chunks of vector stores, and where their words are. Read beside search/postgres.py.

CREATE TABLE search_stores (
    number      BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,  -- never used again, so a store made anew is another
    project     TEXT NOT NULL,
    id          TEXT NOT NULL UNIQUE,
    format      TEXT NOT NULL,               -- ranking.FORMAT of the words; the oldest, while files differ
    dimensions  INTEGER,                     -- floats in each vector; NULL while there is none
    chunks      BIGINT NOT NULL DEFAULT 0,   -- of all files, as are the next two
    words       BIGINT NOT NULL DEFAULT 0,
    vectors     BIGINT NOT NULL DEFAULT 0
);

-- Stores whose row is gone, and whose other rows are being deleted, some at a time.
CREATE TABLE search_deleted (
    store       BIGINT PRIMARY KEY
);

CREATE TABLE search_files (
    number      BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    store       BIGINT NOT NULL,
    id          TEXT NOT NULL,
    format      TEXT NOT NULL,
    attributes  BYTEA NOT NULL,              -- JSON
    usage_bytes BIGINT NOT NULL,
    chunks      INTEGER NOT NULL,
    words       BIGINT NOT NULL,
    vectors     INTEGER NOT NULL,
    UNIQUE (store, id)
);

CREATE TABLE search_chunks (
    number      BIGINT PRIMARY KEY,          -- that of the file << 24 | index
    store       BIGINT NOT NULL,
    start       INTEGER NOT NULL,
    stop        INTEGER NOT NULL,
    page        INTEGER,
    tokens      INTEGER NOT NULL,
    reach       INTEGER NOT NULL,            -- how many of the next pieces the chunk reaches into
    piece       BYTEA NOT NULL               -- UTF-8 of the file's text from this chunk's start to the next one's: TEXT holds no NUL
);
CREATE INDEX search_chunks_of_store ON search_chunks (store);

-- One row for each term of each block of up to 1,024 chunks of one file. The indexes are small: equal keys share a place.
CREATE TABLE search_words (
    store       BIGINT NOT NULL,
    first       BIGINT NOT NULL,             -- the number of the block's first chunk
    term        TEXT COLLATE "C" NOT NULL,
    places      BYTEA NOT NULL,              -- of each chunk that has it: number, how often, the chunk's words (postings.PLACE)
    offsets     BYTEA NOT NULL               -- where in those chunks: uint16
);
CREATE INDEX search_words_by_term ON search_words (store, term);
CREATE INDEX search_words_of_block ON search_words (first);

-- Vectors that came while pgvector was missing, block by block; they are moved as soon as it is there.
CREATE TABLE search_packed_vectors (
    first       BIGINT PRIMARY KEY,
    store       BIGINT NOT NULL,
    dimensions  INTEGER NOT NULL,
    vectors     BYTEA NOT NULL               -- float16, of unit length
);
CREATE INDEX search_packed_vectors_of_store ON search_packed_vectors (store);
