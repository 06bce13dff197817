"""What tests and benchmarks share. Needs the extra ``dev``; nothing that serves or learns imports it."""
