"""Two forwards of one token that prove how a model's cache turns with position."""
