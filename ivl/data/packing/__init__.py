"""Packing: the batches of an epoch, planned in sections and balanced over processes by time."""
