"""Milliseconds: of one call with cold caches, of a call inside a CUDA graph, and the speed of a plain copy."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
from collections.abc import Callable, Sequence

import torch

from ..dense import host_ms

Call = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Times:
    """Median, 20th and 80th percentile, in milliseconds."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Times:
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), fifths[0], fifths[3])


class Timer:
    """Times calls on one device.

    On a GPU with Triton's `do_bench`: CUDA events, and the L2 cache emptied before every call, as it is between the
    layers of a model. On a CPU with the host's clock.

    Parameters
    ----------
    device : torch.device
    warmup_ms, rep_ms : float
        How long a GPU call is repeated before and while it is timed; a CPU call for ten times `rep_ms`.
    """

    def __init__(self, device: torch.device, warmup_ms: float = 10.0, rep_ms: float = 50.0) -> None:
        self.device, self.warmup_ms, self.rep_ms = device, warmup_ms, rep_ms

    def __call__(self, call: Call) -> Times:
        if self.device.type != "cuda":
            return Times.of(host_ms(call, 10 * self.rep_ms))
        from triton.testing import do_bench

        return Times(*do_bench(call, warmup=self.warmup_ms, rep=self.rep_ms, quantiles=[0.5, 0.2, 0.8]))

    def graph(self, calls: Sequence[Call]) -> float:
        """Median milliseconds of one of `calls`, all captured in one CUDA graph: no launch overhead from Python.

        The calls should work on different inputs that together do not fit the L2 cache.
        """
        # Some libraries set themselves up in the first call, which must not happen in a capture.
        current, side = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for call in calls:
                call()
        current.wait_stream(side)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                kept = [call() for call in calls]  # the outputs live as long as the graph
            ms = self(graph.replay).median / len(calls)
        finally:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own stream behind
        del kept
        graph.reset()
        return ms

    def copy_tb_per_s(self) -> float:
        """Bytes read and written a second by a copy much larger than the caches, in TB/s."""
        count = (2 << 30) if self.device.type == "cuda" else (256 << 20)
        source = torch.empty(count, dtype=torch.uint8, device=self.device).fill_(1)
        target = torch.empty_like(source)
        return 2 * count / self(lambda: target.copy_(source)).median / 1e9

    def synchronize(self) -> None:
        """Wait for the device, and raise the error it may have met."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Give cached memory back between shapes, so that the next one finds it in one piece."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def fits(self, needed_bytes: int) -> bool:
        """Whether that much device memory is free; on a CPU taken for granted."""
        if self.device.type != "cuda":
            return True
        return needed_bytes < 0.9 * torch.cuda.mem_get_info(self.device)[0]

    @property
    def l2_bytes(self) -> int:
        """Size of a GPU's L2 cache in bytes."""
        return getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 64 << 20)

    @contextlib.contextmanager
    def on_device(self):
        """Make the device current: Triton and CUDA graphs use the current one."""
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            yield
