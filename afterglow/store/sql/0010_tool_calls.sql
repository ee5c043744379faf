-- Tool calls that this server makes, and deadlines.

-- What a project's calls are signed with; made with the first of them.
CREATE TABLE tool_secrets (
    project_id  TEXT PRIMARY KEY,
    secret      TEXT NOT NULL,              -- `whsec_…`
    created_at  BIGINT NOT NULL
);

-- Calls that a caller is to answer in time. Rows of runs that ended otherwise go when they are due.
CREATE TABLE tool_deadlines (
    project_id  TEXT NOT NULL,
    thread_id   TEXT NOT NULL,
    run_id      TEXT NOT NULL,
    step_id     TEXT NOT NULL,
    call_id     TEXT NOT NULL,
    timeout_s   DOUBLE PRECISION NOT NULL,
    due         DOUBLE PRECISION NOT NULL,  -- Unix seconds
    PRIMARY KEY (project_id, run_id, step_id, call_id)
);
CREATE INDEX tool_deadlines_due ON tool_deadlines (due);
CREATE INDEX tool_deadlines_by_thread ON tool_deadlines (project_id, thread_id);
