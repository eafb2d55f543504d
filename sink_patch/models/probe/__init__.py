"""Two forwards of one token prove how a model's cache turns with position."""
