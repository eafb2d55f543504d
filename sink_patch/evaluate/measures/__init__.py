"""`sink-patch eval`: what a model does in a stream, as figures."""
