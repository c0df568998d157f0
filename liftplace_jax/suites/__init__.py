"""Benchmark suites: each measures, and returns rows that `benchmark.py` writes down."""
