"""Tensors of a cache: rotation, rings, sinks, and where one forward reads and writes them."""
