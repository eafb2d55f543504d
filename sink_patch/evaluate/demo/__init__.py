"""`sink-patch demo`."""
