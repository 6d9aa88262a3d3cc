"""Data sets: sources of rows, their index of lengths, and the batches of an epoch."""
