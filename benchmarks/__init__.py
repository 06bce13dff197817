"""Benchmarks; docs/how-to/benchmarks.md says what each measures and how to run it."""
