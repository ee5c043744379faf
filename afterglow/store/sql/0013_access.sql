-- Limits, and the audit log of administrative acts.

ALTER TABLE runs ADD COLUMN key_id TEXT NOT NULL DEFAULT '';    -- of the key that created it
CREATE INDEX runs_active_by_key ON runs (project_id, key_id) WHERE holds_thread = 1;

ALTER TABLE files ADD COLUMN key_id TEXT NOT NULL DEFAULT '';   -- of the key that stored it; '' for what code has made
ALTER TABLE files ADD COLUMN size_bytes BIGINT;                 -- NULL until it is first asked for, in older rows

CREATE INDEX api_keys_by_project ON api_keys (project_id, created_at, id);

-- What all processes together have left of a minute's requests, polls or tokens. key_id: '' for the whole project.
CREATE TABLE rates (
    project_id  TEXT NOT NULL,
    key_id      TEXT NOT NULL,
    kind        TEXT NOT NULL,
    level       DOUBLE PRECISION NOT NULL,
    at          DOUBLE PRECISION NOT NULL,  -- when it was that much
    PRIMARY KEY (project_id, key_id, kind)
);

-- For how long code has run on a day, where that is limited. key_id: '' for the whole project.
CREATE TABLE sandbox_use (
    project_id  TEXT NOT NULL,
    key_id      TEXT NOT NULL,
    day         BIGINT NOT NULL,            -- days since 1970, UTC
    seconds     DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (project_id, key_id, day)
);

-- What administrators have done, by key or by command. project_id: what it was done to; '' when that is no project.
CREATE TABLE audit_log (
    project_id  TEXT NOT NULL,
    id          TEXT NOT NULL,
    seq         BIGINT NOT NULL,            -- the microsecond
    created_at  BIGINT NOT NULL,
    type        TEXT NOT NULL,
    actor_id    TEXT NOT NULL,
    resource_id TEXT NOT NULL,              -- the project or key that was made, changed or ended
    object      TEXT NOT NULL,
    PRIMARY KEY (project_id, id)
);
CREATE INDEX audit_log_by_time ON audit_log (created_at, seq, id);
