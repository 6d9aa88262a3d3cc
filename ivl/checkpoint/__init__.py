"""Checkpoint folders and a run's checkpoint files, read and written: names, weights, quantisation."""
