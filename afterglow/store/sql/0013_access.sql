-- Limits and the audit log.
SELECT 1;  -- nothing yet
