"""Timed runs: decode steps on a filled cache, whole generations, and the largest batch that fits."""

from __future__ import annotations

import contextlib
import gc
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .modes import Mode, Shape

Row = dict[str, Any]
CHUNK = 16  # steps timed together, so that reading the clock costs nothing
COPIES = 4  # copies timed together
COPY_SECONDS = 0.3  # of copies that do not count, and again of those that do
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


class DoesNotFit(Exception):
    """A batch for which there is no memory.

    Attributes
    ----------
    largest : int or None
        The largest batch whose cache would fit, where the cache knows.
    """

    def __init__(self, largest: int | None = None) -> None:
        super().__init__()
        self.largest = largest


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def held(device: torch.device) -> int:
    """Bytes that the allocator has given out; 0 on a CPU, where nobody counts them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


@contextlib.contextmanager
def clean(device: torch.device) -> Iterator[None]:
    """Leaves no memory behind, and turns the allocator's error into `DoesNotFit`."""
    failure: DoesNotFit | None = None
    _free(device)  # also what the frames of an error held until it was handled
    try:
        yield
    except OUT_OF_MEMORY as error:
        failure = DoesNotFit(getattr(error, "largest_batch", None))
    finally:
        _free(device)
    if failure is not None:
        raise failure


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def fill(cache: Any, model: Any, shape: Shape, batch: int, tokens: int) -> None:
    """Random keys and values of a prompt, the same for every sequence: no prompt has to be computed."""
    g = torch.Generator(model.device).manual_seed(0)
    size = (2, 1, shape.kv_heads, tokens, shape.head_dim)
    x = torch.randn(size, generator=g, dtype=model.dtype, device=model.device)
    keys, values = (part.expand(batch, -1, -1, -1) for part in x)
    for index in range(shape.layers):
        cache.update(keys, values, index)


def bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy, read and write together: what the floor of a step is computed from.

    The fastest of many groups of copies, timed where they run, after as many that do not count: a GPU that was idle
    may have to raise its clocks, and a busy host launches late. A median of the first 20 ms, by the host's clock, has
    come out at half the bandwidth on an H200 whose next run had all of it. A group is never faster than the memory.
    """
    size = 1 << 30 if device.type == "cuda" else 1 << 26
    # Not zeros: those of a CPU may all be one page, which is read from a cache.
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copies() -> None:
        for _ in range(COPIES):
            target.copy_(source)

    def groups(least: int) -> list[float]:
        times: list[float] = []
        while len(times) < least or sum(times) < COPY_SECONDS:
            times.append(seconds_of(copies, device))
        return times

    groups(1)
    return 2 * size * COPIES / min(groups(8))


def seconds_of(work: Callable[[], None], device: torch.device) -> float:
    """Seconds that `work` takes, on a GPU by the GPU's own clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        begin.record()
        work()
        end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def agreed(value: int, device: torch.device) -> int:
    """The least `value` of all ranks: they must do the same calls."""
    if not torch.distributed.is_initialized():
        return value
    least = torch.tensor(value, device=device)
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return int(least)


class StepClock:
    """A stopping criterion that never stops and notes the time."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.times = device, [time.perf_counter()]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        sync(self.device)
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Run:
    """One mode with one batch: a cache, and the loop that goes with it."""

    def __init__(
        self, model: Any, mode: Mode, batch: int, max_length: int, mlp_tokens: int | None = None
    ) -> None:
        from mustafar import Decoder

        self.model, self.mode, self.batch = model, mode, batch
        self.shape = Shape.of(model)
        self.device = model.device
        self.max_length = max_length
        self.cache = mode.make_cache(model, max_length)
        self.decoder = None
        if mode.loop == "decoder":
            self.decoder = Decoder(model, self.cache, batch, eos_token_id=(), mlp_tokens=mlp_tokens)

    def capture(self, prompt: int) -> float:
        """Seconds it took to get ready: compiling and capturing, once; what is chosen is for prompts so long."""
        start = time.perf_counter()
        if self.decoder is not None:
            self.decoder.capture(prompt)
        elif self.mode.loop == "compiled":
            self.cache.reset()
            self._generate(torch.ones((self.batch, 8), dtype=torch.int64, device=self.device), 4)
        sync(self.device)
        return time.perf_counter() - start

    def steps(self, context: int, steps: int) -> list[float]:
        """Milliseconds per step over chunks of steps, behind a random cache of `context` tokens."""
        if self.decoder is not None:
            return self._decoder_steps(context, steps)
        self.cache.reset()
        fill(self.cache, self.model, self.shape, self.batch, context)
        ids = torch.ones((self.batch, context + 1), dtype=torch.int64, device=self.device)
        times = self._generate(ids, steps + 3).times[3:]  # the first steps do what is done once
        return [1e3 * (b - a) for a, b in itertools.pairwise(times)]

    def _decoder_steps(self, context: int, steps: int) -> list[float]:
        decoder = self.decoder
        decoder.start_at(context, torch.zeros(self.batch, dtype=torch.int64, device=self.device))
        fill(self.cache, self.model, self.shape, self.batch, context)
        for _ in range(4):
            decoder.step()
        times = []
        for begin in range(0, steps, CHUNK):
            count = min(CHUNK, steps - begin)
            sync(self.device)
            start = time.perf_counter()
            for _ in range(count):
                decoder.step()
            sync(self.device)
            times.append(1e3 * (time.perf_counter() - start) / count)
        return times

    def _generate(self, ids: torch.Tensor, new: int) -> StepClock:
        clock = StepClock(self.device)
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=self.cache,
            max_new_tokens=new,
            min_new_tokens=None,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=[clock],
        )
        sync(self.device)
        return clock

    def first_token(self, ids: torch.Tensor) -> float:
        """Seconds from the prompt to its first token."""
        sync(self.device)
        if self.decoder is None:
            self.cache.reset()
            times = self._generate(ids, 1).times
            return times[1] - times[0]
        start = time.perf_counter()
        self.decoder.prefill(ids)
        sync(self.device)
        return time.perf_counter() - start

    def decode(self, ids: torch.Tensor, marks: list[int]) -> list[float]:
        """Seconds after the first token until each of `marks` new tokens are there."""
        if self.decoder is None:
            self.cache.reset()
            times = self._generate(ids, marks[-1]).times
            return [times[mark] - times[1] for mark in marks]
        self.decoder.prefill(ids)
        sync(self.device)
        start, seconds, done = time.perf_counter(), [], 1
        for mark in marks:
            for _ in range(done, mark):
                self.decoder.step()
            done = mark
            sync(self.device)
            seconds.append(time.perf_counter() - start)
        return seconds


def floor_ms(mode: Mode, shape: Shape, batch: int, tokens: int, bytes_per_second: float) -> float:
    """Milliseconds that reading weights and cache once takes."""
    return 1e3 * (shape.weight_bytes + mode.kv_bytes(shape, batch, 0, tokens)) / bytes_per_second


def step_row(
    model: Any,
    mode: Mode,
    batch: int,
    context: int,
    steps: int,
    bytes_per_second: float,
) -> Row:
    """One row of the table of step times."""
    device, shape = model.device, Shape.of(model)
    middle = context + max(1, steps // 2)
    # A fixed mode repeats the step that fills its cache; the others' steps are as long on average.
    max_length, begin = (middle, middle - 1) if mode.fixed else (context + steps + 8, context)
    with clean(device):
        before = held(device)
        run = Run(model, mode, batch, max_length)
        setup = run.capture(begin) if mode.kind == "mustafar-auto" else 0.0  # it takes its memory by then
        mode = mode.settled(run.cache)
        fill(run.cache, model, shape, batch, begin)
        kv = held(device) - before
        setup += run.capture(begin)
        times = run.steps(begin, steps)
        floor = floor_ms(mode, shape, batch, middle, bytes_per_second)
        mean = sum(times) / len(times)
        row = {
            "section": "steps",
            "mode": mode.name,
            "batch": batch,
            "context": context,
            "ms_step": mean,
            "ms_median": quantile(times, 0.5),
            "ms_p20": quantile(times, 0.2),
            "ms_p80": quantile(times, 0.8),
            "floor_ms": floor,
            "times_floor": mean / floor,
            "tokens_per_s": 1e3 * batch / mean,
            "kv_bytes": kv or None,
            "kv_formula": mode.kv_bytes(shape, batch, max_length),
            "peak_bytes": peak(device) or None,
            "setup_s": setup,
        }
        del run
    return row


def generation_rows(
    model: Any,
    mode: Mode,
    batch: int,
    prompt: int,
    marks: list[int],
    repeats: int,
    mlp_tokens: int | None,
    progress: Callable[[str], None],
) -> list[Row]:
    """Rows of a whole generation from a random prompt: time to first token, then tokens per second."""
    device, shape = model.device, Shape.of(model)
    max_length = prompt + marks[-1] + 8
    rows = []
    with clean(device):
        g = torch.Generator().manual_seed(1)
        ids = torch.randint(1, shape.vocabulary, (batch, prompt), generator=g).to(device)
        before = held(device)
        run = Run(model, mode, batch, max_length, mlp_tokens)
        run.capture(prompt)
        mode = mode.settled(run.cache)
        run.first_token(ids[:, : min(prompt, 128)])  # the first prompt of a process pays for more than itself
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        firsts = [run.first_token(ids)]
        prefill_peak = peak(device) - before
        while len(firsts) < agreed(min(repeats, 1 + int(20 / firsts[0])), device):
            firsts.append(run.first_token(ids))
        progress(f"first token {quantile(firsts, 0.5):.3f} s")
        seconds = run.decode(ids, marks)
        memory = run.cache.memory() if hasattr(run.cache, "memory") else {}
        for mark, taken in zip(marks, seconds, strict=True):
            rows.append(
                {
                    "section": "generation",
                    "mode": mode.name,
                    "batch": batch,
                    "context": prompt,
                    "new_tokens": mark,
                    "ttft_s": quantile(firsts, 0.5),
                    "ms_step": 1e3 * taken / max(1, mark - 1),
                    "tokens_per_s": batch * (mark - 1) / taken,
                    "tokens_per_s_with_prompt": batch * mark / (taken + quantile(firsts, 0.5)),
                    "peak_bytes": (peak(device) - before) or None,
                    "prefill_peak_bytes": prefill_peak or None,
                    "kv_bytes": memory.get("allocated_bytes"),
                    "kv_formula": mode.kv_bytes(shape, batch, max_length),
                }
            )
        del run
    return rows


def largest_row(
    model: Any,
    mode: Mode,
    context: int,
    steps: int,
    bytes_per_second: float,
    progress: Callable[[str], None],
    limit: int | None = None,
) -> Row:
    """The largest batch whose cache of `context` tokens, and its steps, fit the GPU: estimated, then tried,
    smaller and smaller. Its prompts would have to be computed some at a time."""
    shape = Shape.of(model)
    max_length = context + steps // 2 if mode.fixed else context + steps + 8
    one = mode.kv_bytes(shape, 1, max_length)
    if limit is None:
        free = torch.cuda.mem_get_info(model.device)[0] + (
            torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
        )
        # The fill's compressed copy of a layer, logits, graph and compiler.
        limit = int((free - (2 << 30)) / (one * (1 + 1 / shape.layers) + 8 * shape.vocabulary))
    batch = max(1, limit)
    while True:
        try:
            row = step_row(model, mode, batch, context, steps, bytes_per_second)
        except DoesNotFit as error:
            progress(f"batch {batch} does not fit")
            if batch == 1:
                raise
            less = batch - max(1, batch // 25)
            batch = max(1, less if error.largest is None else min(less, error.largest))
            continue
        return row | {"section": "largest"}
