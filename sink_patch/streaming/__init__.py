"""One forward from beginning to end, and the rows of a cache between forwards."""
