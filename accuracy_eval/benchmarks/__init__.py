"""Benchmarks of the accuracy evaluation, one package each."""
