"""Measures what the rail costs, compared with what people would use instead.

`make bench` runs the benchmarks, and docs/benchmarks.md describes the method.
"""
