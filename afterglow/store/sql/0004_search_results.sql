-- What file searches of runs have found. A step's object names files and scores; the quoted text is here alone, so that it
-- can be shown on request, and deleted with its file.
CREATE TABLE search_results (
    project_id  TEXT NOT NULL,
    thread_id   TEXT NOT NULL,
    run_id      TEXT NOT NULL,
    step_id     TEXT NOT NULL,
    call_id     TEXT NOT NULL,
    position    BIGINT NOT NULL,            -- of the result among those of its call, from 0
    file_id     TEXT NOT NULL,
    marker      TEXT NOT NULL,              -- by which the model cites it; one of a kind within the run
    object      TEXT NOT NULL,
    PRIMARY KEY (project_id, step_id, call_id, position)
);
CREATE INDEX search_results_by_run ON search_results (project_id, run_id);
CREATE INDEX search_results_by_thread ON search_results (project_id, thread_id);
CREATE INDEX search_results_by_file ON search_results (project_id, file_id);
