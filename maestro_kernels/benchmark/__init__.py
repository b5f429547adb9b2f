"""Benchmarks: cases from real models, providers, rows, and what is said and shown of them.

`maestro-kernels bench`, `pytest bench/` and the sentence-encoder job are thin users of this folder.
"""
