"""One forward of a single token at fixed shapes and addresses, for a graph that is compiled once.

All that changes from token to token is in tensors, and is changed before the graph runs: where the token is written,
which slots are seen, its position. What the graph reads of Python is the same in each step.
"""
