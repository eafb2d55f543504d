"""Continuous batching with sinks."""
