"""Checks on a GPU; `python dev.py gpu run CHECK` runs them, benchmarks/gpu.md lists them with their results."""
