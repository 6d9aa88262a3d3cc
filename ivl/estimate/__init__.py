"""Memory and operations of a step, before a weight is read."""
