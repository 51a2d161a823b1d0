"""What `backend="auto"` of a static cache becomes: both steps are captured and timed, and the faster one stays.

The table of crossovers, by which dynamic caches decide, compares with the fastest dense attention there is. A
captured step cannot have that one: cuDNN's takes its lengths from the host. What it can have is FlashAttention with
the lengths on the device, and whether that is faster depends on more than attention: on how a token is appended, and
on what is fused. So the decoder measures, with its model and batch, on its GPU: some seconds, once.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from mustafar.cache import MustafarCache

if TYPE_CHECKING:
    from mustafar.decoding import Decoder

STEPS, ROUNDS = 8, 4


def choose_backend(decoder: Decoder, prompt: int) -> dict[str, float]:
    """Decide for a decoder's cache, if it is static, "auto" and undecided; else nothing happens.

    Without a graph, and where the dense form has no memory, it is the kernels.

    Parameters
    ----------
    prompt : int
        Tokens in the cache at which to time steps.

    Returns
    -------
    dict
        Seconds a step, by backend; empty where nothing was timed.
    """
    cache = decoder.cache
    if not (isinstance(cache, MustafarCache) and cache.is_static and cache.backend == "auto"):
        return {}
    held = min(prompt, cache.max_length - STEPS)
    if not decoder.uses_graph or held < 1:
        cache.settle("kernel")
        return {}
    seconds: dict[str, float] = {}
    for backend in ("simulate", "kernel"):
        decoder.forget_step()
        cache.settle(backend)
        try:
            decoder.capture()
            seconds[backend] = _time(decoder, held)
        except torch.OutOfMemoryError:
            if backend == "kernel":
                raise
    if seconds["kernel"] > min(seconds.values()):
        decoder.forget_step()
        cache.settle("simulate")
        decoder.capture()
    return seconds


def _time(decoder: Decoder, held: int) -> float:
    """Seconds a step with `held` tokens in the cache, whatever they are: the fastest of some rounds."""
    nothing = torch.zeros(decoder.batch_size, dtype=torch.int64, device=decoder.device)
    found = []
    for _ in range(ROUNDS):
        decoder.start_at(held, nothing)
        decoder.cache.pretend(held)
        torch.cuda.synchronize(decoder.device)
        start = time.perf_counter()
        for _ in range(STEPS):
            decoder.step()
        torch.cuda.synchronize(decoder.device)
        found.append((time.perf_counter() - start) / STEPS)
    decoder.cache.reset()
    return min(found)
