"""The test suite on every transformers: `python -m tests.matrix --help`. A tool of developers, not installed."""
