"""The test suite on every transformers: `python -m compat.matrix --help`. A tool of developers, not installed."""
