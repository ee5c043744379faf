-- What several processes must know of each other, and what a move from one database to another has done so far.

-- Where processes keep the bytes of files, when that is a folder: it has to be the same one for all of them.
CREATE TABLE data_folders (
    id          TEXT PRIMARY KEY,               -- what is written in the folder to know it again
    host        TEXT NOT NULL,
    path        TEXT NOT NULL,
    seen_at     BIGINT NOT NULL
);
INSERT INTO data_folders VALUES ('', '', '', 0);    -- whoever decides writes to it, one at a time

-- What `afterglow migrate` has brought here. While there is any row, not everything is here, and nothing may be served.
CREATE TABLE moves (
    kind        TEXT NOT NULL,                  -- source, bytes, table, blob or store
    item        TEXT NOT NULL,
    detail      TEXT NOT NULL,
    PRIMARY KEY (kind, item)
);
