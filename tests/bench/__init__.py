"""Benchmarks: they print and record what they measured, and assert nothing."""
