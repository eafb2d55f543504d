"""Whole calls of `generate`, over all families and all that a call can be, against an independent computation."""
