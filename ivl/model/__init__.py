"""The model: vision encoder, projector, language model, attention, loss. Imports nothing of data/ or lit/."""
