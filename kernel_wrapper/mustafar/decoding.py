"""`Decoder`: greedy search and sampling with one captured step, for caches whose state is on the device.

On a GPU the whole step, from a token to the next, is one CUDA graph, captured once and replayed for every token
of every prompt; elsewhere the same step runs as it is, with the same result::

    cache = MustafarCache(model.config, 0.7, 0.7, static=True, max_length=8192 + 512)
    decoder = Decoder(model, cache, batch_size=8)
    result = decoder.generate(**tokenizer(prompts, return_tensors="pt", padding=True), max_new_tokens=512)

transformers' `StaticCache` works too: the dense model in the same loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, StaticCache, StoppingCriteria
from transformers.cache_utils import Cache, StaticLayer

from mustafar.cache import MustafarCache
from mustafar.choosing import choose_backend
from mustafar.fusion import fused
from mustafar.merging import lay_together
from mustafar.prefill import mlp_in_pieces
from mustafar.sampling import Sampling, largest

WARM_UP_STEPS = 3
CHECK_EVERY = 16  # steps between questions to the device whether all sequences have ended
DECODERS: weakref.WeakSet[Decoder] = weakref.WeakSet()  # for mustafar.parallel.leave


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What a decoder returns.

    Attributes
    ----------
    sequences : Tensor, int64 [B, prompt + n]
        Prompt and answer, as `model.generate` returns them: after its end token a row is padded.
    new_tokens : Tensor, int64 [B, n]
        The answers alone.
    stopped : {"eos", "max_new_tokens", "max_length"}
        What ended the last of them. "max_length": the cache is full, and the text so far is here.
    """

    sequences: torch.Tensor
    new_tokens: torch.Tensor
    stopped: str


class StopAtMaxLength(StoppingCriteria):
    """Ends `model.generate` when a static cache is full, with the text so far, where it would raise."""

    def __init__(self, cache: Cache) -> None:
        self.max_length = cache.get_max_length()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        full = 0 < self.max_length < input_ids.shape[1]  # the newest token is not in the cache yet
        return torch.full((input_ids.shape[0],), full, dtype=torch.bool, device=input_ids.device)


class Decoder:
    """Decodes batches of `batch_size` prompts with one model and one cache of fixed size.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder in eval mode, on one device. A GPU's step is captured the first time it is needed.
    cache : MustafarCache or StaticCache
        ``MustafarCache(..., static=True)``, or transformers' dense one; reset for every prompt.
    batch_size : int
    sampling : Sampling, optional
        Greedy search without it.
    eos_token_id, pad_token_id : int or sequence of int, optional
        The model's own by default; an empty sequence for no end token.
    graph : bool, optional
        Capture the step; by default where the model is on a GPU.
    fuse : bool, optional
        Compile what lies between matrix products and attention (norms, rotary embedding, activation) with
        torch.compile when capturing, and multiply with q, k and v, and with both halves of the MLP, at once; by
        default where a graph is captured and a compiler is found. Rounding may differ from eager in the last
        bit. The model is left as it was, but for where those weights lie in memory.
    mlp_tokens : int, optional
        The most tokens of a batch of prompts that go through an MLP at once (`mustafar.prefill.mlp_in_pieces`).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: MustafarCache | StaticCache,
        batch_size: int,
        *,
        sampling: Sampling | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        graph: bool | None = None,
        fuse: bool | None = None,
        mlp_tokens: int | None = None,
    ) -> None:
        self.max_length = _check_cache(cache)
        device = model.device
        if graph and device.type != "cuda":
            raise ValueError(f"graph=True: CUDA graphs need a model on a GPU, it is on {device}")
        spread = len(set((getattr(model, "hf_device_map", None) or {"": device}).values())) > 1
        if graph and spread:
            raise ValueError(
                "graph=True: the model is spread over several devices, which one graph cannot hold"
            )
        self.uses_graph = device.type == "cuda" and not spread if graph is None else graph
        self.fuse = self.uses_graph if fuse is None else fuse
        self.fuse_if_possible = fuse is None
        self.model, self.cache, self.batch_size, self.device = model, cache, batch_size, device
        self.sampling, self.mlp_tokens = sampling, mlp_tokens
        self.graph: torch.cuda.CUDAGraph | None = None
        self.captures = 0
        DECODERS.add(self)

        defaults = model.generation_config
        eos = defaults.eos_token_id if eos_token_id is None else eos_token_id
        eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        pad = defaults.pad_token_id if pad_token_id is None else pad_token_id
        self.pad = pad if pad is not None else eos[0] if eos else 0
        whole = {"dtype": torch.int64, "device": device}
        self.eos = torch.tensor(eos, **whole) if eos else None
        # All that a step reads and writes besides the cache.
        self.ids = torch.zeros((batch_size, 1), **whole)
        self.positions = torch.zeros((batch_size, 1), **whole)
        self.starts = torch.zeros((batch_size, 1, 1, 1), dtype=torch.int32, device=device)
        self.finished = torch.zeros(batch_size, dtype=torch.bool, device=device)
        self.tokens = torch.zeros((batch_size, self.max_length + 1), **whole)
        self.count = torch.zeros(1, **whole)
        self.slots = torch.arange(self.max_length, **whole)
        self.noise: torch.Tensor | None = None
        if sampling is not None:
            self.generator = torch.Generator(device)
            vocabulary = model.get_output_embeddings().weight.shape[0]
            self.noise = torch.ones((batch_size, vocabulary), dtype=torch.float32, device=device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        max_new_tokens: int = 128,
    ) -> Decoded:
        """Continue prompts [B, T], left-padded where they differ in length.

        Raises
        ------
        ValueError
            If the prompt does not fit the cache, the batch is another one, or padding is not on the left.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        prompt = input_ids.shape[1]
        self.prefill(input_ids, attention_mask)
        steps = min(max_new_tokens - 1, self.max_length - prompt)
        stopped = "max_length" if steps < max_new_tokens - 1 else "max_new_tokens"
        done = 0
        for done in range(1, steps + 1):
            if self.eos is not None and done % CHECK_EVERY == 1 and bool(self.finished.all()):
                done -= 1
                break
            self.step()
        new = self.tokens[:, : done + 1].clone()
        if self.eos is not None:
            ends = torch.isin(new, self.eos)
            first = torch.where(ends.any(1), ends.to(torch.int32).argmax(1), new.shape[1])
            if bool(ends.any(1).all()):
                new, stopped = new[:, : int(first.max()) + 1], "eos"
        if stopped == "max_length":
            warnings.warn(
                f"the cache is full: stopped after {new.shape[1]} of {max_new_tokens} new tokens, as max_length is "
                f"{self.max_length} and the prompt has {prompt}",
                stacklevel=2,
            )
        return Decoded(torch.cat([input_ids.to(new.device), new], dim=1), new, stopped)

    @torch.no_grad()
    def prefill(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> None:
        """Forget what is held, read prompts [B, T] and choose the first token of each answer."""
        if input_ids.dim() != 2 or input_ids.shape[0] != self.batch_size:
            raise ValueError(
                f"input_ids: expected [{self.batch_size}, T], the decoder's batch size, got {list(input_ids.shape)}"
            )
        prompt = input_ids.shape[1]
        if not 0 < prompt <= self.max_length:
            raise ValueError(
                f"input_ids: the cache has room for {self.max_length} tokens, and the prompt has {prompt}: make the "
                "cache with a larger max_length"
            )
        input_ids = input_ids.to(self.device)
        self.capture(prompt)
        starts, mask = self._padding(input_ids, attention_mask)
        self.start_at(prompt, starts)
        positions = (torch.arange(prompt, device=self.device) - starts[:, None]).clamp(min=0)
        with mlp_in_pieces(self.model, self.mlp_tokens):
            logits = self._forward(input_ids, positions, mask)
        if self.noise is not None:
            self.generator.manual_seed(self.sampling.seed)
            self.noise.exponential_(generator=self.generator)
        self._choose(logits)

    def start_at(self, tokens: int, starts: torch.Tensor) -> None:
        """Make ready for prompts of `tokens` tokens whose padding ends at `starts` [B]."""
        self.cache.reset()
        self.starts.copy_(starts.view(-1, 1, 1, 1))
        self.positions.copy_((tokens - starts)[:, None])
        self.finished.fill_(False)
        self.count.zero_()

    @torch.no_grad()
    def step(self) -> None:
        """One more token for every sequence, behind the others in `tokens`. Does not wait for the device."""
        if self.noise is not None:
            self.noise.exponential_(generator=self.generator)
        if isinstance(self.cache, MustafarCache):
            self.cache.before_step()
        if self.graph is not None:
            self.graph.replay()
        else:
            self._step()

    @torch.no_grad()
    def capture(self, prompt: int | None = None) -> None:
        """Take all memory and capture the step, once; before a prompt, as it is tried on an empty cache.

        A cache with backend="auto" decides here for prompts of `prompt` tokens; None is half of its room.
        """
        choose_backend(self, prompt or self.max_length // 2)
        if self.captures or not self.uses_graph:
            return
        # Whether this step makes use of it or not: weights must not move once a graph has their addresses.
        lay_together(self.model)
        self.cache.reset()
        self._forward(self.ids, self.positions, None)  # makes the cache take its memory
        with contextlib.ExitStack() as stack:
            if self.fuse:
                stack.enter_context(fused(self.model, self.cache))
            try:
                self._warm_up()
            except torch._dynamo.exc.TorchDynamoException as error:
                if not self.fuse_if_possible:
                    raise
                stack.close()
                self.fuse = False
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                warnings.warn(f"the step is captured without compiled parts: {reason}", stacklevel=2)
                self._warm_up()
            graph = torch.cuda.CUDAGraph()
            # With "global", a call of another thread, such as a loader pinning memory, would break the capture.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._step()
        self.graph = graph
        self.captures += 1
        self.cache.reset()

    def forget_step(self) -> None:
        """Drop the captured step, and the memory that it holds."""
        self.graph, self.captures = None, 0

    def _warm_up(self) -> None:
        """Some steps on an empty cache, on a stream of their own, as a capture wants it."""
        self.cache.reset()
        if isinstance(self.cache, MustafarCache):
            self.cache.expect_decoding()
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                self.count.zero_()
                self._step()
        torch.cuda.current_stream(self.device).wait_stream(side)

    def _step(self) -> None:
        self._choose(self._forward(self.ids, self.positions, self._step_mask()))
        self.positions.add_(1)

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        output = self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def _step_mask(self) -> torch.Tensor:
        """What the step's token sees; 4D, so that transformers leaves it as it is."""
        if isinstance(self.cache, MustafarCache):
            return self.starts
        seen = (self.slots <= self.cache.get_seq_length()) & (self.slots >= self.starts)
        return seen.view(self.batch_size, 1, 1, self.max_length)

    def _choose(self, logits: torch.Tensor) -> None:
        if self.sampling is not None:
            # The largest p / e, e exponential: a draw from p that needs no host and no normalisation.
            logits = self.sampling.scores(logits) - self.noise.log()
        token = largest(logits)
        if self.eos is not None:
            token = torch.where(self.finished, self.pad, token)
            self.finished |= (token[:, None] == self.eos).any(-1)
        self.ids.copy_(token[:, None])
        self.tokens.index_copy_(1, self.count, self.ids)
        self.count.add_(1)

    def _padding(
        self, input_ids: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """First token of every prompt, int64 [B], and the mask, None where nothing is padding."""
        starts = torch.zeros(self.batch_size, dtype=torch.int64, device=self.device)
        if mask is None:
            return starts, None
        if mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask: expected the shape of input_ids, {list(input_ids.shape)}, got {list(mask.shape)}"
            )
        mask = mask.to(self.device)
        seen = mask.bool()
        if bool(seen.all()):
            return starts, None
        if bool((seen[:, :-1] & ~seen[:, 1:]).any()) or not bool(seen[:, -1].all()):
            raise ValueError(
                "attention_mask: padding must be on the left: set tokenizer.padding_side to 'left', and pass the "
                "tokenizer's attention_mask"
            )
        return (~seen).sum(1), mask


def _check_cache(cache: Any) -> int:
    """Tokens that there is room for, of a cache whose step can be captured."""
    if isinstance(cache, MustafarCache):
        if not cache.is_static:
            raise ValueError(
                "cache: expected MustafarCache(..., static=True, max_length=...), got a dynamic one"
            )
        return cache.get_max_length()
    if not isinstance(cache, Cache) or not cache.layers:
        raise TypeError(
            f"cache: expected a static MustafarCache or transformers.StaticCache, got {type(cache).__name__}"
        )
    for layer in cache.layers:
        if not isinstance(layer, StaticLayer) or layer.is_sliding:
            raise NotImplementedError(
                f"cache: a step over {type(layer).__name__} cannot be captured; only static layers of full attention "
                "can"
            )
    return cache.layers[0].max_cache_len
