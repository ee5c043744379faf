-- Files. Their bytes are kept elsewhere, each under a key of ours (`blob`).

CREATE TABLE files (
    project_id  TEXT NOT NULL,
    id          TEXT NOT NULL,
    seq         BIGINT NOT NULL,            -- as in assistants: the microsecond of creation
    created_at  BIGINT NOT NULL,
    expires_at  BIGINT,                     -- from then on it counts as not there, and soon it is not
    purpose     TEXT NOT NULL,
    blob        TEXT NOT NULL,
    object      TEXT NOT NULL,
    PRIMARY KEY (project_id, id)
);
CREATE INDEX files_by_time ON files (project_id, created_at, seq);
CREATE INDEX files_by_expiry ON files (expires_at) WHERE expires_at IS NOT NULL;

-- Which assistants and threads name a file in code_interpreter.file_ids: a file that is deleted leaves those lists.
CREATE TABLE file_uses (
    project_id  TEXT NOT NULL,
    file_id     TEXT NOT NULL,
    holder      TEXT NOT NULL,              -- assistants or threads
    holder_id   TEXT NOT NULL,
    PRIMARY KEY (project_id, file_id, holder, holder_id)
);
CREATE INDEX file_uses_by_holder ON file_uses (project_id, holder, holder_id);

-- Bytes that no file owns: noted before they are written, and when their file is deleted. What a crash leaves here is
-- deleted at the next start.
CREATE TABLE loose_blobs (
    project_id  TEXT NOT NULL,
    blob        TEXT NOT NULL,
    created_at  BIGINT NOT NULL,
    PRIMARY KEY (project_id, blob)
);

-- Which file stands under which name below /mnt/data of a thread's code interpreter.
CREATE TABLE sandbox_files (
    project_id  TEXT NOT NULL,
    thread_id   TEXT NOT NULL,
    name        TEXT NOT NULL,
    seq         BIGINT NOT NULL,            -- the order in which names were taken
    created_at  BIGINT NOT NULL,
    file_id     TEXT NOT NULL,
    size_bytes  BIGINT NOT NULL,
    input_id    TEXT,                       -- the file that was given under this name; file_id differs once code has changed it
    PRIMARY KEY (project_id, thread_id, name)
);
CREATE INDEX sandbox_files_by_file ON sandbox_files (project_id, file_id);
CREATE INDEX sandbox_files_by_input ON sandbox_files (project_id, input_id) WHERE input_id IS NOT NULL;
