"""Benchmarks: how they are asked, and how answers are scored. Stands alone."""
