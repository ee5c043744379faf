-- Webhooks: whom a project wants to be told of what happens, and what was or is to be told. The log is the queue.

CREATE TABLE webhook_endpoints (
    project_id       TEXT NOT NULL,
    id               TEXT NOT NULL,
    seq              BIGINT NOT NULL,
    created_at       BIGINT NOT NULL,
    secret           TEXT NOT NULL,      -- as it is: whatever is sent is signed with it
    old_secret       TEXT,               -- signs as well until old_secret_until
    old_secret_until BIGINT,
    object           TEXT NOT NULL,
    PRIMARY KEY (project_id, id)
);
CREATE INDEX webhook_endpoints_by_time ON webhook_endpoints (project_id, created_at, seq);

CREATE TABLE webhook_deliveries (
    project_id  TEXT NOT NULL,
    endpoint_id TEXT NOT NULL,
    id          TEXT NOT NULL,
    seq         BIGINT NOT NULL,
    created_at  BIGINT NOT NULL,
    owner_id    TEXT NOT NULL,           -- the thread or vector store that it tells of; empty: a test
    status      TEXT NOT NULL,
    claims      INTEGER NOT NULL,        -- the number of the last one, which alone may write how its try went
    worker      TEXT,                    -- who has it in hand
    failures    INTEGER NOT NULL DEFAULT 0, -- tries that failed since it was recorded, or last resent
    due_at      DOUBLE PRECISION,        -- while pending: when it may be claimed; of a claimed one, should nothing be heard
    object      TEXT NOT NULL,
    PRIMARY KEY (project_id, id)
);
CREATE INDEX webhook_deliveries_by_time ON webhook_deliveries (project_id, endpoint_id, created_at, seq);
CREATE INDEX webhook_deliveries_by_owner ON webhook_deliveries (project_id, owner_id);
CREATE INDEX webhook_deliveries_due ON webhook_deliveries (due_at, endpoint_id) WHERE status = 'pending';
CREATE INDEX webhook_deliveries_by_age ON webhook_deliveries (created_at);
