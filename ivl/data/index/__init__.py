"""Index of rows: lengths and facts of every row, built by all processes and mapped from disk."""
