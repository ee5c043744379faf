-- Which worker opened the last code interpreter session of a thread: another's is out of date, if it still has one.
CREATE TABLE sandbox_sessions (
    project_id  TEXT NOT NULL,
    thread_id   TEXT NOT NULL,
    worker      TEXT NOT NULL,
    PRIMARY KEY (project_id, thread_id)
);
