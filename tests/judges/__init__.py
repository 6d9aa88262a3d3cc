"""Judges: programs of others that say whether ids, labels, prompts, weights and answers are right."""
