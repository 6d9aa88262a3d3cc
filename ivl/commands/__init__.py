"""Commands beside fit and predict: check, plan, chat, export, models."""
