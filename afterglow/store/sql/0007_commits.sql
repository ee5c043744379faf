-- Of Postgres alone: which transaction was committed last in each place that holds one at a time. When the answer to a
-- COMMIT was lost, this tells what became of it.
CREATE TABLE commits (
    place           TEXT PRIMARY KEY,
    number          BIGINT NOT NULL,
    committed_at    BIGINT NOT NULL
);
