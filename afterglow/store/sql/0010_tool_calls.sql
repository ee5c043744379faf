-- Tool calls that this server makes, and deadlines.
SELECT 1;  -- nothing yet
