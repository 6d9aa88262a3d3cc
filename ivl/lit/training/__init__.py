"""Training steps: schedule, loss denominator, preferences, feature cache, lack of memory."""
