"""`sink-patch chat`."""
