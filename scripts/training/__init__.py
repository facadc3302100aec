"""The parts of scripts/train_demo.py: one module for each network, and what they share."""
