"""Files of rows with random access: jsonl, JSON lists, parquet, csv, tsv."""
