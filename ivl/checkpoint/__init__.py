"""Checkpoint folders and a run's checkpoint files: names, weights, quantisation."""
