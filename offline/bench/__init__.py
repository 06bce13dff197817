"""The field's benchmarks of steering, and capability beside it."""
