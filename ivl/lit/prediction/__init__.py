"""Answers in predict and validation: prompts, generation, rows of a file of predictions, benchmarks."""
