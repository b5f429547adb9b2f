"""Planted faults: each changes one line of the package, and one test must notice."""
