"""What a window of a model costs, in bytes, before any cache is made."""
