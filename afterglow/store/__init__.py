"""The database: drivers that run transactions, and the schema. The statements themselves are in `afterglow/rows/`."""
