"""Weights in 8 bits: linears.py multiplies, policy.py says which layers of a network are so, and why."""
