"""The table of families, and the verdict on every model of the installed transformers."""
