"""Sweeps: the configurations of a table, listed in a YAML file, predicted or resumed, and reported."""
