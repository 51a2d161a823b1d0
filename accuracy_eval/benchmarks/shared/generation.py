"""Greedy generation for a batch of prompts."""

from __future__ import annotations

from .models import LoadedModel


class Generator:
    """Continues prompts with one loaded model: greedy, in batches padded on the left.

    Parameters
    ----------
    loaded
        Model, tokenizer and how to make a cache.

    Attributes
    ----------
    kv_bytes
        Of the last call's pruned cache, for each row, when the answer was complete: bytes held, and bytes that a
        dense cache would hold. None where nothing is compressed.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.model, self.tokenizer, self.make_cache = loaded.model, loaded.tokenizer, loaded.make_cache
        self.kv_bytes: tuple[int, int] | None = None
        # A checkpoint may ask for sampling; greedy generation must not, nor warn about what it then ignores.
        generation = self.model.generation_config
        generation.do_sample, generation.num_beams = False, 1
        generation.temperature = generation.top_p = generation.top_k = None
        generation.max_length = type(generation)().max_length  # max_new_tokens is what counts
        self.pad = next(
            (
                i
                for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, *self._end_tokens())
                if i is not None
            ),
            0,
        )

    def _end_tokens(self) -> list[int]:
        end = self.model.generation_config.eos_token_id
        if end is None:
            end = self.tokenizer.eos_token_id
        return [] if end is None else [end] if isinstance(end, int) else list(end)

    def _options(self, prompt_length: int, max_new_tokens: int, stop_at_newline: bool) -> dict:
        options: dict = {"max_new_tokens": max_new_tokens, "pad_token_id": self.pad}
        if stop_at_newline:
            newline = self.tokenizer.encode("\n", add_special_tokens=False)[-1:]
            end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
            options |= {"min_length": prompt_length + 1, "eos_token_id": end + newline or None}
        elif end := self._end_tokens():
            options["eos_token_id"] = end
        return options

    def predict(self, task, rows: list[dict]) -> list[str]:
        """Return the answers to some rows of a task, whose prompts are their `ids`, generated as one batch."""
        return self.generate(
            [list(row["ids"]) for row in rows],
            max_new_tokens=task.max_new_tokens,
            stop_at_newline=getattr(task, "stop_at_newline", False),  # of LongBench's tasks
        )

    def generate(
        self, prompts: list[list[int]], *, max_new_tokens: int, stop_at_newline: bool = False
    ) -> list[str]:
        """Return the answers to prompts of token ids, without their special tokens.

        `stop_at_newline` lets a newline end an answer, after at least one token.
        """
        import torch

        longest = max(len(prompt) for prompt in prompts)
        padding = [longest - len(prompt) for prompt in prompts]
        device = self.model.device
        ids = torch.tensor([[self.pad] * n + p for n, p in zip(padding, prompts, strict=True)], device=device)
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding], device=device)
        options = self._options(longest, max_new_tokens, stop_at_newline)
        cache = self.make_cache() if self.make_cache else None
        if cache is not None:
            options["past_key_values"] = cache
        output = self.model.generate(input_ids=ids, attention_mask=mask, **options)
        self.kv_bytes = None if cache is None else _bytes_held(cache, len(prompts))
        answers = [answer[longest:].tolist() for answer in output]
        if len(prompts) > 1:  # an answer that ended early is followed by padding
            answers = [_up_to_end(answer, options.get("eos_token_id") or []) for answer in answers]
        return [self.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]


def _bytes_held(cache, rows: int) -> tuple[int, int] | None:
    """Bytes of keys and values for each row: held, and in a dense cache; None of a simulated one."""
    if cache.backend == "simulate":
        return None
    memory = cache.memory()
    held = memory["compressed_bytes"] + memory["window_bytes"]
    return held // rows, memory["dense_equivalent_bytes"] // rows


def _up_to_end(answer: list[int], end_tokens: list[int]) -> list[int]:
    end = next((i for i, token in enumerate(answer) if token in end_tokens), len(answer) - 1)
    return answer[: end + 1]
