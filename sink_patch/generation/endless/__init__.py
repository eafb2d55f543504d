"""Text without end (`sink_patch.stream`): a call of `generate` whose decoding is done one token at a time, from outside."""
