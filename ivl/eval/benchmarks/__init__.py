"""Benchmarks: their prompts and rules, and their official files as records."""
