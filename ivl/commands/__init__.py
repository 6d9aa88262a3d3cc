"""The other commands: check, plan, chat, export, models."""
