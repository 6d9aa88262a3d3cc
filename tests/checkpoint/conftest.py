"""Fixtures of the model's tests."""

from tests.model.conftest import recorded, seeded

__all__ = ["recorded", "seeded"]
