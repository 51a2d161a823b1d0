"""From a row to the text a model reads: template, truncation in the middle, chat template, in this order."""

from __future__ import annotations

from ..shared.chat import with_chat_template
from .tasks import Task


def fill(task: Task, row: dict) -> str:
    """Put a row into the task's template."""
    return task.prompt.format(**row)


def truncate(prompt: str, tokenizer, max_length: int) -> str:
    """Cut the middle out of a prompt of more than `max_length` tokens; special tokens are lost."""
    tokens = tokenizer(prompt, truncation=False, verbose=False)["input_ids"]
    if len(tokens) <= max_length:
        return prompt
    half = int(max_length / 2)
    return "".join(
        tokenizer.decode(part, skip_special_tokens=True) for part in (tokens[:half], tokens[-half:])
    )


def encode(task: Task, row: dict, tokenizer, *, max_length: int, template: str) -> list[int]:
    """Return the token ids a model is given for one row.

    The text is tokenized once more, with special tokens, after the template is around it. A template that
    writes the beginning-of-text token itself therefore yields it twice, as in the official code.
    """
    prompt = truncate(fill(task, row), tokenizer, max_length)
    if task.chat:
        prompt = with_chat_template(prompt, template, tokenizer)
    return tokenizer(prompt, truncation=False, verbose=False)["input_ids"]
