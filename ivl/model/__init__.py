"""Model: vision encoder, projector, decoder, loss. Imports nothing of data/ or lit/."""
