"""Which tokens a cache has read, and whether a text that is given again begins with them."""
