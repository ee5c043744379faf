-- The ledger, costs and budgets.
SELECT 1;  -- nothing yet
