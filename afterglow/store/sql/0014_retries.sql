-- Idempotency keys and retries.

ALTER TABLE requests ADD COLUMN retry_count BIGINT NOT NULL DEFAULT 0; -- as the SDK counts: 0 for the first
ALTER TABLE requests ADD COLUMN matched INTEGER NOT NULL DEFAULT 0;    -- 1: a retry was given its result
ALTER TABLE requests ADD COLUMN idempotency_key TEXT;                  -- its row is there before object_id is known
ALTER TABLE requests ADD COLUMN since TEXT NOT NULL DEFAULT '';        -- where in the run's log its stream begins
CREATE UNIQUE INDEX requests_by_key ON requests (project_id, key_id, idempotency_key)
    WHERE idempotency_key IS NOT NULL;

-- What was answered to requests with a key. It quotes an object, and is deleted with it.
CREATE TABLE answers (
    project_id  TEXT NOT NULL,
    request_id  TEXT NOT NULL,
    object_id   TEXT NOT NULL,
    owner_id    TEXT NOT NULL,              -- the thread, vector store or file that the object is in; else itself
    created_at  BIGINT NOT NULL,
    status      INTEGER NOT NULL,
    body        TEXT NOT NULL,
    PRIMARY KEY (project_id, request_id)
);
CREATE INDEX answers_by_object ON answers (project_id, object_id);
CREATE INDEX answers_by_owner ON answers (project_id, owner_id);
CREATE INDEX answers_by_time ON answers (created_at);
