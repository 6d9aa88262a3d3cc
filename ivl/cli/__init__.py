"""Command line before torch is imported: help pages, unknown options, names of other trainers."""
