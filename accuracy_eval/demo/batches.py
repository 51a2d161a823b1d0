"""Training batches: contexts, each with many questions behind it, as ids and the places of the answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from demo.tasks import TASKS, Rng, head_ids, make

ALL = tuple(TASKS)


def asked_in(sentences: int) -> int:
    """Questions per row: many, so that every context is learnt from often; short ones ask some facts twice."""
    return max(2, min(24, sentences))


def layout(sentences: int, names: Sequence[str] = ALL) -> tuple[int, dict[str, torch.Tensor]]:
    """Words of the longest row, and per task the columns whose next word belongs to an answer, [asked, a]."""
    asked = asked_in(sentences)
    length, columns = 0, {}
    for name in names:
        task = TASKS[name]
        before = 1 + len(task.head.split()) + 8 * sentences
        q, a = len(task.question.split()), len(task.answer.split())
        start = before + torch.arange(asked)[:, None] * (q + a) + q - 1
        columns[name] = start + torch.arange(a)
        length = max(length, before + asked * (q + a))
    return length, columns


def make_batch(
    rng: Rng, rows_per_task: int, sentences: int, density: tuple[float, float], names: Sequence[str] = ALL
) -> torch.Tensor:
    """int64 [tasks * rows_per_task, length], tasks in order, padded on the right with id 0."""
    asked = asked_in(sentences)
    length, _ = layout(sentences, names)
    parts = []
    for name in names:
        context, questions, answers = make(rng, name, rows_per_task, sentences, asked, density)
        row = torch.cat(
            [
                head_ids(rng, name).expand(rows_per_task, -1),
                context.flatten(1),
                torch.cat([questions, answers], 2).flatten(1),
            ],
            1,
        )
        parts.append(torch.nn.functional.pad(row, (0, length - row.shape[1])))
    return torch.cat(parts)
