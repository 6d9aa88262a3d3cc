"""Rows of files into examples and batches. Imports nothing of model/ or lit/."""
