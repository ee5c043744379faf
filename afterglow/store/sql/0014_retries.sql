-- Idempotency keys and retries.
SELECT 1;  -- nothing yet
