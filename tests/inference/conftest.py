"""Fixtures of the model's tests, for those of inference."""

from tests.model.conftest import recorded, seeded

__all__ = ["recorded", "seeded"]
