-- Finding things, busy threads and retention.
SELECT 1;  -- nothing yet
