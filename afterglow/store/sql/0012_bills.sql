-- The ledger, costs and budgets.

ALTER TABLE model_calls ADD COLUMN text_step_id TEXT;           -- of the message that came before its tool calls
ALTER TABLE model_calls ADD COLUMN factor BIGINT NOT NULL DEFAULT 1000000; -- calibration of `estimated`, in millionths
ALTER TABLE model_calls ADD COLUMN counted TEXT;                -- tokens as added to the run, JSON; null in old rows
ALTER TABLE model_calls ADD COLUMN cost BIGINT;                 -- billionths of the currency; null without a price
ALTER TABLE model_calls ADD COLUMN currency TEXT NOT NULL DEFAULT '';
ALTER TABLE model_calls ADD COLUMN unpriced_tokens BIGINT NOT NULL DEFAULT 0;
ALTER TABLE model_calls ADD COLUMN made TEXT NOT NULL DEFAULT '{}'; -- what the prompt depended on beside run and thread

-- What model calls have used and cost, at the prices of their time. It outlives runs and threads: ids and numbers only.
CREATE TABLE spend (
    project_id        TEXT NOT NULL,
    day               BIGINT NOT NULL,      -- since 1970, UTC
    run_id            TEXT NOT NULL,
    model             TEXT NOT NULL,        -- as asked for
    currency          TEXT NOT NULL,
    thread_id         TEXT NOT NULL,
    assistant_id      TEXT NOT NULL,
    calls             BIGINT NOT NULL,
    prompt_tokens     BIGINT NOT NULL,
    cached_tokens     BIGINT NOT NULL,
    completion_tokens BIGINT NOT NULL,
    reasoning_tokens  BIGINT NOT NULL,
    cost              BIGINT NOT NULL,      -- billionths of the currency
    unpriced_tokens   BIGINT NOT NULL,      -- of models whose price was not known; they are not in `cost`
    PRIMARY KEY (project_id, day, run_id, model, currency)
);

-- The metadata of runs that have spent something, as it was at their latest call. Deleted with the thread.
CREATE TABLE spend_tags (
    project_id  TEXT NOT NULL,
    run_id      TEXT NOT NULL,
    key         TEXT NOT NULL,
    value       TEXT NOT NULL,
    PRIMARY KEY (project_id, run_id, key)
);

-- Messages that were deleted, so that an earlier prompt can say what is gone from it. No text.
CREATE TABLE deleted_messages (
    project_id  TEXT NOT NULL,
    thread_id   TEXT NOT NULL,
    id          TEXT NOT NULL,
    seq         BIGINT NOT NULL,
    created_at  BIGINT NOT NULL,
    run_id      TEXT,
    role        TEXT NOT NULL,
    PRIMARY KEY (project_id, id)
);
CREATE INDEX deleted_messages_by_seq ON deleted_messages (project_id, thread_id, seq);
