"""Measuring: cases from real models, providers, the timer, the roofline, rows and reports.

`maestro-kernels bench`, `pytest bench/` and the sentence-encoder job are thin users of this folder.
"""
