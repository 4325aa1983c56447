"""Benchmarks: longscan, its peers and the machine's ceiling, measured in turn."""
