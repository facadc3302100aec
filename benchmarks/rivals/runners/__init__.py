"""A module for each engine: its `make(place, case, options, cache, threads)` reads a case's weights, gives a Runner."""
