"""LongBench (arXiv 2308.14508): prompts, predictions and scores as its official code makes them.

`predict` and `evaluate` hold the two command lines, `settings` their options; `tasks`, `data`, `prompts`,
`generation`, `metrics` and `scoring` state what the benchmark defines. `benchmarks.shared` has the rest.
"""
