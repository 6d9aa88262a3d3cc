"""Conversations into token ids and labels: tokenizers and templates."""
