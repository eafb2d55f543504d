"""`sink-patch eval cost`: memory and time a token over the length of a stream, with the dense cache and with ours."""
