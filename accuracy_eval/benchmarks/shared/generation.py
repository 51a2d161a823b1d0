"""Greedy generation for a batch of prompts."""

from __future__ import annotations

from .models import LoadedModel


class Generator:
    """Continues prompts with one loaded model: greedy, in batches padded on the left.

    Parameters
    ----------
    loaded
        Model, tokenizer and how to make a cache.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.model, self.tokenizer, self.make_cache = loaded.model, loaded.tokenizer, loaded.make_cache
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
        if self.make_cache:
            options["past_key_values"] = self.make_cache()
        output = self.model.generate(input_ids=ids, attention_mask=mask, **options)
        answers = [answer[longest:].tolist() for answer in output]
        if len(prompts) > 1:  # an answer that ended early is followed by padding
            answers = [_up_to_end(answer, options.get("eos_token_id") or []) for answer in answers]
        return [self.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]


def _up_to_end(answer: list[int], end_tokens: list[int]) -> list[int]:
    end = next((i for i, token in enumerate(answer) if token in end_tokens), len(answer) - 1)
    return answer[: end + 1]
