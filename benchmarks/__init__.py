"""Measurements: the drawn world and its oracle, and comparisons with other libraries."""
