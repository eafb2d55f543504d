"""Decoding through a graph of the model."""
