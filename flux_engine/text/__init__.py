"""Prompts to what the networks read."""
