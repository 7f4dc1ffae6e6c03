"""Benchmarks, run by hand: `python -m tests.bench`. See `__main__` for what is measured and how."""
