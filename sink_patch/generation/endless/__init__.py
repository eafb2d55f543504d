"""Text without end (`sink_patch.stream`): a call of `generate` that is decoded from outside, a token at a time."""
