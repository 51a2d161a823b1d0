"""FlashInfer as a dense peer: its decode attention over a paged cache, and its call for a single request.

FlashInfer compiles its kernels when they are first needed, a minute or two each. `build` compiles all that a
benchmark needs side by side; from the repository's root, `python -m kernel.benchmark.flashinfer_peer` does only that.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from .shapes import ATTENTION_SECTIONS, Case, Shape, plan

if TYPE_CHECKING:
    from .problem import Problem

PAGE_TOKENS = 16
WORKSPACE_BYTES = 512 << 20
NOT_INSTALLED = "not installed"


def version() -> str:
    """FlashInfer's version, or why there is none: "not installed", or that it does not import and its error."""
    try:
        return str(importlib.import_module("flashinfer").__version__)
    except ModuleNotFoundError as error:
        if error.name == "flashinfer":
            return NOT_INSTALLED
        return f"does not import: no module {error.name}"
    except Exception as error:  # whatever a third party's import raises: it is reported, not passed over
        return f"does not import: {type(error).__name__}: {first_line(error)}"


def usable(version: str) -> bool:
    """Whether `version` is a version and not a reason."""
    return re.fullmatch(r"\d+(\.\w+)+(\+\S+)?", version) is not None


def first_line(error: Exception) -> str:
    """The first line of an error's message, shortened."""
    return (str(error).strip() or "no message").splitlines()[0][:200]


def build(cases: Iterable[Case]) -> None:
    """Compile the kernels that the attention cases need, side by side.

    Each in a ninja of its own, as FlashInfer does when a kernel is first called: what its own build of several,
    `build_jit_specs`, has made in one ninja would be made once more then (0.6.13).

    Raises
    ------
    RuntimeError
        With the compiler's output.
    """
    from flashinfer.jit.attention import gen_batch_prefill_module, gen_single_prefill_module

    wanted = [case.shape for case in cases if case.section in ATTENTION_SECTIONS]
    plain = (0, False, False, False)  # no position encoding, sliding window, soft cap, float16 sums
    specs = []
    for name, head_dim in sorted({(s.dtype, s.head_dim) for s in wanted}):
        dtype = getattr(torch, name)
        specs.append(
            gen_batch_prefill_module("fa2", dtype, dtype, dtype, torch.int32, head_dim, head_dim, *plain)
        )
    for name, head_dim in sorted({(s.dtype, s.head_dim) for s in wanted if s.batch == 1}):
        dtype = getattr(torch, name)
        specs.append(gen_single_prefill_module("fa2", dtype, dtype, dtype, head_dim, head_dim, *plain))
    with ThreadPoolExecutor(max(1, len(specs))) as pool:  # each waits for a process
        list(pool.map(lambda spec: spec.build(verbose=False), specs))
    missing = [spec.name for spec in specs if not spec.is_compiled]
    if missing:  # ninja, when it is stopped, may say that all went well
        raise RuntimeError(f"{len(missing)} of {len(specs)} modules are missing: {', '.join(missing)}")


class Paged:
    """`BatchDecodeWithPagedKVCacheWrapper` with tensor cores, pages of 16 tokens in order, planned once a shape."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        import flashinfer

        self.tokens = shape.tokens + shape.window
        self.pages = -(-self.tokens // PAGE_TOKENS)
        workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        last = self.tokens - (self.pages - 1) * PAGE_TOKENS
        self.wrapper.plan(
            torch.arange(shape.batch + 1, dtype=torch.int32) * self.pages,
            torch.arange(shape.batch * self.pages, dtype=torch.int32, device=device),
            torch.full((shape.batch,), last, dtype=torch.int32),
            shape.q_heads,
            shape.kv_heads,
            shape.head_dim,
            PAGE_TOKENS,
            q_data_type=getattr(torch, shape.dtype),
            kv_data_type=getattr(torch, shape.dtype),
        )

    def paged(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, Hkv, T, D] as pages [B * pages, 16, Hkv, D]."""
        x = torch.nn.functional.pad(x, (0, 0, 0, self.pages * PAGE_TOKENS - self.tokens))
        return x.unflatten(2, (self.pages, PAGE_TOKENS)).permute(0, 2, 3, 1, 4).flatten(0, 1).contiguous()

    def bind(self, problem: Problem) -> Callable[[], torch.Tensor]:
        """A call without arguments that attends over `problem`'s dense cache: [B, H, D]."""
        cache = self.paged(problem.k), self.paged(problem.v)
        return lambda: self.wrapper.run(problem.q, cache)


def bind_single(problem: Problem) -> Callable[[], torch.Tensor]:
    """`single_decode_with_kv_cache` with tensor cores, for a batch of one: [1, H, D]."""
    import flashinfer

    q, k, v = problem.q[0], problem.k[0], problem.v[0]  # heads before tokens: layout HND
    return lambda: flashinfer.single_decode_with_kv_cache(q, k, v, "HND", use_tensor_cores=True)[None]


def main() -> int:
    found = version()
    print(f"FlashInfer: {found}", flush=True)
    if not usable(found):
        return 1
    build(plan(ATTENTION_SECTIONS, on_gpu=True))
    print("FlashInfer's kernels are built")
    return 0


if __name__ == "__main__":
    sys.exit(main())
