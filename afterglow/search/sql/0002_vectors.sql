-- What needs pgvector (0.7 or newer).

CREATE TABLE search_vectors (
    number      BIGINT PRIMARY KEY,
    store       BIGINT NOT NULL,
    embedding   halfvec NOT NULL             -- of unit length
) WITH (toast_tuple_target = 8160);          -- vectors of up to 4,000 floats stay in the row, where a scan finds them at once
CREATE INDEX search_vectors_of_store ON search_vectors (store);
