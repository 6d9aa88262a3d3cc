"""Files on disk: atomic writes, parquet, pictures."""
