"""Text: conversations → token ids and labels, by tokenizers and templates."""
