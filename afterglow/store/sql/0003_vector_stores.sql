-- Vector stores, their files and batches, and uploads. What is searched is not here: the index holds it.

CREATE TABLE vector_stores (
    project_id      TEXT NOT NULL,
    id              TEXT NOT NULL,
    seq             BIGINT NOT NULL,            -- as in assistants: the microsecond of creation
    created_at      BIGINT NOT NULL,
    last_active_at  BIGINT NOT NULL,
    expires_at      BIGINT,                     -- moves with last_active_at; from then on it has expired, for good
    swept           INTEGER NOT NULL DEFAULT 0, -- 1: it has expired, and the index has let go of it
    in_progress     BIGINT NOT NULL DEFAULT 0,  -- how many of its files have this status; so the next three
    completed       BIGINT NOT NULL DEFAULT 0,
    failed          BIGINT NOT NULL DEFAULT 0,
    cancelled       BIGINT NOT NULL DEFAULT 0,
    usage_bytes     BIGINT NOT NULL DEFAULT 0,  -- of its files together
    object          TEXT NOT NULL,              -- what callers say of it; the rest is in the columns
    PRIMARY KEY (project_id, id)
);
CREATE INDEX vector_stores_by_time ON vector_stores (project_id, created_at, seq);
CREATE INDEX vector_stores_by_expiry ON vector_stores (expires_at) WHERE expires_at IS NOT NULL AND swept = 0;

-- A file in a store. While it is in progress its row is the job: it waits for a worker, or a worker has it.
CREATE TABLE vector_store_files (
    project_id      TEXT NOT NULL,
    store_id        TEXT NOT NULL,
    id              TEXT NOT NULL,              -- that of the file
    seq             BIGINT NOT NULL,
    created_at      BIGINT NOT NULL,
    status          TEXT NOT NULL,
    usage_bytes     BIGINT NOT NULL,
    embedding_model TEXT,                       -- of its embeddings in the index; null while there are none
    turn            BIGINT NOT NULL,            -- jobs are done in the order of their turns, see rows/vector_store_files.py
    tries           INTEGER NOT NULL DEFAULT 0, -- since it was attached
    not_before      DOUBLE PRECISION NOT NULL DEFAULT 0,
    attempt         INTEGER NOT NULL DEFAULT 0,
    worker          TEXT,
    lease_until     DOUBLE PRECISION,
    object          TEXT NOT NULL,
    PRIMARY KEY (project_id, store_id, id)
);
CREATE INDEX vector_store_files_by_time ON vector_store_files (project_id, store_id, created_at, seq);
CREATE INDEX vector_store_files_by_status ON vector_store_files (project_id, store_id, status, created_at, seq);
CREATE INDEX vector_store_files_by_file ON vector_store_files (project_id, id);
CREATE INDEX vector_store_files_waiting ON vector_store_files (turn, seq) WHERE status = 'in_progress';
CREATE INDEX vector_store_files_turns ON vector_store_files (project_id, store_id, turn) WHERE status = 'in_progress';
CREATE INDEX vector_store_files_by_worker ON vector_store_files (worker) WHERE worker IS NOT NULL;
CREATE INDEX vector_store_files_embedded ON vector_store_files (project_id, store_id) WHERE embedding_model IS NOT NULL;

CREATE TABLE file_batches (
    project_id  TEXT NOT NULL,
    id          TEXT NOT NULL,
    store_id    TEXT NOT NULL,
    created_at  BIGINT NOT NULL,
    cancelled   INTEGER NOT NULL DEFAULT 0,     -- 1: its cancel was asked
    PRIMARY KEY (project_id, id)
);
CREATE INDEX file_batches_by_store ON file_batches (project_id, store_id);

-- What became of a batch's files. It stays so when a file is attached again later, or detached.
CREATE TABLE batch_files (
    project_id  TEXT NOT NULL,
    batch_id    TEXT NOT NULL,
    store_id    TEXT NOT NULL,
    file_id     TEXT NOT NULL,
    status      TEXT NOT NULL,
    PRIMARY KEY (project_id, batch_id, file_id)
);
CREATE INDEX batch_files_by_status ON batch_files (project_id, batch_id, status);
CREATE INDEX batch_files_waiting ON batch_files (project_id, store_id, file_id) WHERE status = 'in_progress';

-- Where the index may say otherwise than the rows: written in the transaction that changes rows, and struck off once
-- the index follows. What a crash leaves here is done at the next start.
CREATE TABLE index_chores (
    id          TEXT PRIMARY KEY,
    project_id  TEXT NOT NULL,
    store_id    TEXT NOT NULL,
    file_id     TEXT NOT NULL                   -- empty: the whole store
);
CREATE INDEX index_chores_of_stores ON index_chores (project_id, store_id) WHERE file_id = '';

CREATE TABLE uploads (
    project_id  TEXT NOT NULL,
    id          TEXT NOT NULL,
    created_at  BIGINT NOT NULL,
    expires_at  BIGINT NOT NULL,
    status      TEXT NOT NULL,
    life_s      BIGINT,                         -- how long its file is kept; null: until it is deleted
    object      TEXT NOT NULL,
    PRIMARY KEY (project_id, id)
);
CREATE INDEX uploads_pending ON uploads (expires_at) WHERE status = 'pending';

CREATE TABLE upload_parts (
    project_id  TEXT NOT NULL,
    upload_id   TEXT NOT NULL,
    id          TEXT NOT NULL,
    size_bytes  BIGINT NOT NULL,
    blob        TEXT NOT NULL,
    PRIMARY KEY (project_id, upload_id, id)
);
