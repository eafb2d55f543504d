"""Attention on the sinks, and how many of them a model needs."""
