"""Measures Afterglow against a model stub: what `make bench` runs. README.md says how to read it."""
