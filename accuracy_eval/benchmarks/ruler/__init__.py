"""RULER (arXiv 2404.06654): its 13 tasks, generated for the model's own tokenizer, predicted and scored.

`predict` and `evaluate` hold the two command lines, `settings` their options; `tasks` says which tasks there are,
`needles`, `variables`, `counts` and `documents` generate them, `generate` fits them to a length, `scoring` scores.
README.md says what differs from the official generator.
"""
