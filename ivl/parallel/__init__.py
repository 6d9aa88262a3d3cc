"""Parallelism of one model over devices: layer by layer, or shards of every weight."""
