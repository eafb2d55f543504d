"""Benchmarks: they print and record measurements, and assert nothing."""
