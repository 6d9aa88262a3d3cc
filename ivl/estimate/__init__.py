"""Estimates of a step's memory and operations, before a weight is read."""
