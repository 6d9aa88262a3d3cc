"""One model over several devices: layer by layer, or shards of every weight."""
