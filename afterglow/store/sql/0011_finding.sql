-- Runs that wait for their thread, runs across threads, words of messages, and what retention goes by.

-- holds_thread is 0 of a run that waits behind another; it is `queued` nevertheless. urgent: it interrupted the run
-- before it, and goes ahead of others that wait.
ALTER TABLE runs ADD COLUMN urgent INTEGER NOT NULL DEFAULT 0;
DROP INDEX runs_queued;
CREATE INDEX runs_queued ON runs (created_at, seq) WHERE status = 'queued' AND holds_thread = 1;
CREATE INDEX runs_waiting ON runs (project_id, thread_id, urgent, seq) WHERE status = 'queued' AND holds_thread = 0;
CREATE INDEX runs_waiting_until ON runs (deadline) WHERE status = 'queued' AND holds_thread = 0;

-- The one that its calls asked for; empty of runs that were over before this was kept and never called any.
ALTER TABLE runs ADD COLUMN model TEXT NOT NULL DEFAULT '';
UPDATE runs SET model = COALESCE((SELECT MAX(model_asked) FROM model_calls c
    WHERE c.project_id = runs.project_id AND c.run_id = runs.id), '');
CREATE INDEX runs_by_model ON runs (project_id, model, created_at, seq);
CREATE INDEX runs_of_project ON runs (project_id, created_at, seq);
CREATE INDEX runs_by_assistant ON runs (project_id, assistant_id, created_at, seq);
CREATE INDEX runs_by_status ON runs (project_id, status, created_at, seq);

-- Messages whose words are not in the index yet. Written with the message; the index follows.
CREATE TABLE unindexed_messages (
    project_id  TEXT NOT NULL,
    message_id  TEXT NOT NULL,
    created_at  BIGINT NOT NULL,
    PRIMARY KEY (project_id, message_id)
);
CREATE INDEX unindexed_messages_by_time ON unindexed_messages (created_at);
INSERT INTO unindexed_messages SELECT project_id, id, created_at FROM messages WHERE status <> 'in_progress';

-- Each message in the index has a number of its project's, never given again. So many in a row make a block.
CREATE TABLE indexed_messages (
    project_id  TEXT NOT NULL,
    number      BIGINT NOT NULL,
    message_id  TEXT NOT NULL,
    PRIMARY KEY (project_id, number)
);
CREATE UNIQUE INDEX indexed_messages_by_id ON indexed_messages (project_id, message_id);

CREATE TABLE message_blocks (
    project_id  TEXT NOT NULL,
    block       BIGINT NOT NULL,
    used        BIGINT NOT NULL,            -- how many of its numbers are given
    first_at    BIGINT NOT NULL,            -- when the oldest of its messages was created, and the newest
    last_at     BIGINT NOT NULL,
    PRIMARY KEY (project_id, block)
);

-- Which messages of a block have a word.
CREATE TABLE message_terms (
    project_id  TEXT NOT NULL,
    block       BIGINT NOT NULL,
    term        TEXT NOT NULL,
    places      BLOB NOT NULL,              -- number less that of the block's first, uint16, ascending
    PRIMARY KEY (project_id, block, term)
);

-- Numbers of messages that were deleted. They are found no more; their words are taken out of the blocks soon after.
CREATE TABLE removed_messages (
    project_id  TEXT NOT NULL,
    number      BIGINT NOT NULL,
    PRIMARY KEY (project_id, number)
);

-- Each project has its own time after which events are deleted.
DROP INDEX events_by_time;
CREATE INDEX events_by_time ON events (project_id, created_at);
