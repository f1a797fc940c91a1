"""Measurements. ``python -m benchmarks.run --family linear --out FILE`` on a GPU; numbers land in results/<gpu>/."""
