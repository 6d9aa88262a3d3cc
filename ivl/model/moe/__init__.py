"""Mixture of experts: router, experts, grouped matrix products."""
