"""Model families: a package for each way of putting networks together."""
