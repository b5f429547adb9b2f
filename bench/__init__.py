"""Benchmarks of the checkout: pytest-benchmark suites and the main job."""
