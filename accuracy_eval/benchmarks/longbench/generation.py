"""Greedy generation as LongBench prescribes it."""

from __future__ import annotations

from ..shared.generation import Generator
from ..shared.models import LoadedModel
from ..shared.options import Settings
from .prompts import encode
from .tasks import Task


class Predictor(Generator):
    """Turns rows into predictions with one loaded model.

    Parameters
    ----------
    loaded
        Model, tokenizer and how to make a cache.
    settings
        The run's settings; prompt limit and chat template are used here.
    """

    def __init__(self, loaded: LoadedModel, settings: Settings) -> None:
        super().__init__(loaded)
        self.settings = settings

    def predict(self, task: Task, rows: list[dict]) -> list[str]:
        """Return the answers to some rows of a task, generated in one batch padded on the left."""
        limit, template = self.settings.max_length, self.settings.chat_template
        prompts = [encode(task, row, self.tokenizer, max_length=limit, template=template) for row in rows]
        return self.generate(
            prompts, max_new_tokens=task.max_new_tokens, stop_at_newline=task.stop_at_newline
        )
