"""Data: rows of files → examples and batches. Imports nothing of model/ or lit/."""
