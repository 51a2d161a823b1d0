"""What the benchmarks have in common: options, models, chat templates, generation, and a run's folder.

A benchmark adds its tasks, its rows and prompts, its scores, and two small command lines.
"""
