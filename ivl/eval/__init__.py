"""Benchmarks: prompts, official files and scoring rules. Stands alone."""
