"""The calls of `generate` in progress, and what the forwards that they make must be given."""
