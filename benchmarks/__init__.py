"""Benchmarks: the programs that measured the figures in the docs. Must not be imported by the product."""
