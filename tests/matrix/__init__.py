"""Run the tests on every version of transformers: `python -m tests.matrix --help`. For developers; not installed."""
