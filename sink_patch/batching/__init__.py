"""Sinks in transformers' continuous batching: many requests beside each other, each in a slot of constant size."""
