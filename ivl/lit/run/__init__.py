"""A run's folder and its end: resume, identity, lock, signals."""
