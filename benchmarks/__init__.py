"""What the rail costs, measured against what people would use instead. `make bench`; method: docs/benchmarks.md."""
