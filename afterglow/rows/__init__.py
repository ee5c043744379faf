"""Every SQL statement, as functions over a transaction; one file per noun. Rows in, rows out: nothing is decided here.

Each function takes the transaction, then the project. `object` columns hold the wire's JSON text.
"""
