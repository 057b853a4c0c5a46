"""Whom the benchmarks measure against."""
