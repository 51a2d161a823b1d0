"""LongBench (arXiv 2308.14508): prompts, predictions and scores as its official code makes them.

`predict` and `evaluate` hold the two command lines; `tasks`, `data`, `prompts` and `metrics` state what the
benchmark defines; `settings`, `store`, `models` and `generation` are how a run is configured, kept and made.
"""
