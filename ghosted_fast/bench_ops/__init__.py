"""Benchmarks of the operators: each is checked, then timed beside its rivals and the roofs."""
