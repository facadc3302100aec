"""The input schemas of hosted models, declared as data."""
