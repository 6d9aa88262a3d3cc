"""Rows: files of rows, and a row of any format → conversation."""
