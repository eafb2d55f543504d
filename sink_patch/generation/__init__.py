"""What the wrapped methods of `generate` do."""
