-- The first schema. Plain enough for SQLite and Postgres alike.
--
-- project_id leads every key and index. `object` is the wire object's JSON text, exactly as it is sent; what is
-- filtered or ordered on stands beside it in a column of its own and is written in the same statement.
-- Lists order by (created_at, seq). Of threads and assistants, seq is the microsecond of creation; messages, runs and
-- steps of one thread draw theirs from threads.last_seq, so that they have one order among themselves.

CREATE TABLE projects (
    id          TEXT PRIMARY KEY,
    created_at  BIGINT NOT NULL
);

CREATE TABLE api_keys (
    id          TEXT PRIMARY KEY,
    project_id  TEXT NOT NULL,
    name        TEXT NOT NULL,
    hash        TEXT NOT NULL UNIQUE,       -- sha-256 of the key, in hex; the key itself is shown once and not kept
    hint        TEXT NOT NULL,              -- its first and last characters
    created_at  BIGINT NOT NULL,
    revoked_at  BIGINT
);

CREATE TABLE assistants (
    project_id  TEXT NOT NULL,
    id          TEXT NOT NULL,
    seq         BIGINT NOT NULL,
    created_at  BIGINT NOT NULL,
    declared    INTEGER NOT NULL DEFAULT 0, -- 1: comes from the operator's assistants file
    asked       TEXT NOT NULL,              -- sampling values that were set; defaults that are only shown are not here
    object      TEXT NOT NULL,
    PRIMARY KEY (project_id, id)
);
CREATE INDEX assistants_by_time ON assistants (project_id, created_at, seq);

CREATE TABLE threads (
    project_id  TEXT NOT NULL,
    id          TEXT NOT NULL,
    seq         BIGINT NOT NULL,
    created_at  BIGINT NOT NULL,
    last_seq    BIGINT NOT NULL DEFAULT 0,
    object      TEXT NOT NULL,
    PRIMARY KEY (project_id, id)
);
CREATE INDEX threads_by_time ON threads (project_id, created_at, seq);

CREATE TABLE thread_metadata (
    project_id  TEXT NOT NULL,
    key         TEXT NOT NULL,
    value       TEXT NOT NULL,
    thread_id   TEXT NOT NULL,
    PRIMARY KEY (project_id, key, value, thread_id)
);
CREATE INDEX thread_metadata_by_thread ON thread_metadata (project_id, thread_id);

CREATE TABLE messages (
    project_id  TEXT NOT NULL,
    thread_id   TEXT NOT NULL,
    id          TEXT NOT NULL,
    seq         BIGINT NOT NULL,
    created_at  BIGINT NOT NULL,
    run_id      TEXT,
    status      TEXT NOT NULL,
    left_behind INTEGER NOT NULL DEFAULT 0, -- 1: written by an attempt that died; 2: replaced since, so not listed
    object      TEXT NOT NULL,
    PRIMARY KEY (project_id, id)
);
CREATE INDEX messages_by_time ON messages (project_id, thread_id, created_at, seq);
CREATE INDEX messages_by_run ON messages (project_id, run_id) WHERE run_id IS NOT NULL;

CREATE TABLE runs (
    project_id   TEXT NOT NULL,
    thread_id    TEXT NOT NULL,
    id           TEXT NOT NULL,
    seq          BIGINT NOT NULL,
    created_at   BIGINT NOT NULL,
    assistant_id TEXT NOT NULL,
    status       TEXT NOT NULL,
    holds_thread INTEGER NOT NULL,          -- 1 while active; cleared by the statement that sets a terminal status
    deadline     BIGINT NOT NULL,           -- when it expires, kept when the object's expires_at is gone
    attempt      INTEGER NOT NULL DEFAULT 0,
    worker       TEXT,
    lease_until  DOUBLE PRECISION,
    asked        TEXT NOT NULL,             -- what the caller or the assistant set, and include[]
    spent        TEXT NOT NULL,             -- usage so far; the object shows it only at the end
    object       TEXT NOT NULL,
    PRIMARY KEY (project_id, id)
);
CREATE UNIQUE INDEX runs_one_active ON runs (project_id, thread_id) WHERE holds_thread = 1;
CREATE INDEX runs_by_time ON runs (project_id, thread_id, created_at, seq);
CREATE INDEX runs_queued ON runs (created_at, seq) WHERE status = 'queued';
CREATE INDEX runs_active ON runs (status, deadline) WHERE holds_thread = 1;

CREATE TABLE steps (
    project_id  TEXT NOT NULL,
    thread_id   TEXT NOT NULL,
    run_id      TEXT NOT NULL,
    id          TEXT NOT NULL,
    seq         BIGINT NOT NULL,
    created_at  BIGINT NOT NULL,
    attempt     INTEGER NOT NULL,
    type        TEXT NOT NULL,
    status      TEXT NOT NULL,
    left_behind INTEGER NOT NULL DEFAULT 0, -- as in messages
    usage       TEXT,                       -- of its model call; the object shows it once the step is closed
    object      TEXT NOT NULL,
    PRIMARY KEY (project_id, id)
);
CREATE INDEX steps_by_run ON steps (project_id, run_id, created_at, seq);
CREATE INDEX steps_calls ON steps (project_id, thread_id, created_at, seq) WHERE type = 'tool_calls';

-- One row per flush: some consecutive events of one attempt as the SSE bytes that were sent.
CREATE TABLE events (
    project_id  TEXT NOT NULL,
    run_id      TEXT NOT NULL,
    attempt     INTEGER NOT NULL,
    first_seq   BIGINT NOT NULL,
    last_seq    BIGINT NOT NULL,
    stop        TEXT NOT NULL DEFAULT '',
    created_at  BIGINT NOT NULL,
    data        BLOB NOT NULL,
    PRIMARY KEY (project_id, run_id, attempt, first_seq)
);
CREATE INDEX events_by_time ON events (created_at);

-- One row per model call: the ground of the ledger.
CREATE TABLE model_calls (
    project_id      TEXT NOT NULL,
    thread_id       TEXT NOT NULL,
    run_id          TEXT NOT NULL,
    step_id         TEXT,
    id              TEXT NOT NULL,
    attempt         INTEGER NOT NULL,
    created_at      BIGINT NOT NULL,
    upstream        TEXT NOT NULL,
    model_asked     TEXT NOT NULL,
    model_answered  TEXT NOT NULL,
    sent            TEXT NOT NULL,          -- parameters as sent, JSON
    dropped         TEXT NOT NULL,          -- names of parameters this upstream refuses, JSON
    cut_off         BIGINT NOT NULL,        -- nothing of the thread above this seq was sent
    kept_from       BIGINT NOT NULL,        -- nor anything below this one; 0 when nothing was left out
    budget_tokens   BIGINT NOT NULL,        -- room for the whole prompt; 0 under last_messages, which asks for none
    left_out        TEXT NOT NULL,          -- ids that were read and not sent, JSON; all below kept_from were not either
    estimated       TEXT NOT NULL,          -- tokens per part, JSON
    usage           TEXT,                   -- as the upstream reported it, JSON; null when it reported none
    prompt_hash     TEXT NOT NULL,
    first_token_ms  BIGINT,
    total_ms        BIGINT NOT NULL,
    finish_reason   TEXT NOT NULL,          -- as reported, or the error's name
    PRIMARY KEY (project_id, id)
);
CREATE INDEX model_calls_by_run ON model_calls (project_id, run_id);
CREATE INDEX model_calls_by_thread ON model_calls (project_id, thread_id, created_at, cut_off);

-- One row per creating POST, written with what it created: ground for idempotency and for matching retries.
CREATE TABLE requests (
    project_id  TEXT NOT NULL,
    id          TEXT NOT NULL,
    key_id      TEXT NOT NULL,
    route       TEXT NOT NULL,
    body_hash   TEXT NOT NULL,
    object_id   TEXT NOT NULL,
    created_at  BIGINT NOT NULL,
    answered    INTEGER NOT NULL DEFAULT 0, -- 1: the answer was written out completely
    PRIMARY KEY (project_id, id)
);
CREATE INDEX requests_by_time ON requests (created_at);
CREATE INDEX requests_by_body ON requests (project_id, key_id, route, body_hash);
