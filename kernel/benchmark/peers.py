"""What the kernels are compared with: dense attention, dense matrix products, torch's topk."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from mustafar import num_kept
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..dense import dense_output, dense_scores, group_rows, matmul_attention, sdpa
from . import flashinfer_peer
from .problem import Problem
from .shapes import Shape

#: Columns of the report, in order. `vs_best_dense` is against the fastest of those the row has, torch_topk left out.
PEERS = {
    "cudnn": "cuDNN SDPA",
    "cudnn_rows": "cuDNN SDPA, a group's queries as rows",
    "flashinfer": "FlashInfer, paged",
    "flashinfer_single": "FlashInfer, single request",
    "cublas": "cuBLAS bmm",
    "torch_sdpa": "torch SDPA",
    "torch_matmul": "torch matrix products",
    "torch_topk": "torch topk and gather",
}
#: On a CPU half precision may be the slowest: dense peers get the fastest of these.
CPU_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclasses.dataclass(frozen=True)
class Peer:
    """One way to compute the same thing densely.

    Attributes
    ----------
    name : str
        A key of `PEERS`. Peers of one name are variants, of which the fastest counts.
    bind : callable
        Takes a Problem, prepares its data outside the timed region and returns the call to time.
    context : callable
        Makes a context manager to call it in.
    variant : str
        What tells it from others of its name.
    """

    name: str
    bind: Callable[[Problem], Callable[[], torch.Tensor]]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    variant: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.variant})" if self.variant else self.name


def _cudnn():
    return sdpa_kernel(SDPBackend.CUDNN_ATTENTION)


def _bind_cudnn(problem: Problem) -> Callable[[], torch.Tensor]:
    q, grouped = problem.q.unsqueeze(2), problem.shape.q_heads != problem.shape.kv_heads
    return lambda: F.scaled_dot_product_attention(q, problem.k, problem.v, enable_gqa=grouped).squeeze(2)


def _bind_rows(problem: Problem) -> Callable[[], torch.Tensor]:
    rows = group_rows(problem.q, problem.shape.kv_heads)
    return lambda: sdpa(rows, problem.k, problem.v)


def _bind_cpu(form: Callable[..., torch.Tensor], dtype: torch.dtype):
    def bind(problem: Problem) -> Callable[[], torch.Tensor]:
        rows = group_rows(problem.q, problem.shape.kv_heads)
        data = [x.to(dtype) for x in (rows, problem.k, problem.v)]
        return lambda: form(*data)

    return bind


def _variants() -> list[tuple[torch.dtype, str]]:
    return [(dtype, str(dtype).removeprefix("torch.")) for dtype in CPU_DTYPES]


def attention_peers(shape: Shape, device: torch.device, with_flashinfer: bool) -> list[Peer]:
    """Dense attention over tokens and window: each peer's call gives [B, H, D]."""
    if device.type != "cuda":
        return [
            Peer(name, _bind_cpu(form, dtype), variant=variant)
            for name, form in (("torch_sdpa", sdpa), ("torch_matmul", matmul_attention))
            for dtype, variant in _variants()
        ]
    peers = [Peer("cudnn", _bind_cudnn, _cudnn)]
    if shape.q_heads != shape.kv_heads:
        peers.append(Peer("cudnn_rows", _bind_rows, _cudnn))
    if with_flashinfer:
        plans: list[flashinfer_peer.Paged] = []

        def bind_paged(problem: Problem) -> Callable[[], torch.Tensor]:
            if not plans:
                plans.append(flashinfer_peer.Paged(shape, device))
            return plans[0].bind(problem)

        peers.append(Peer("flashinfer", bind_paged))
        if shape.batch == 1:
            peers.append(Peer("flashinfer_single", flashinfer_peer.bind_single))
    return peers


def product_peers(op: str, device: torch.device) -> list[Peer]:
    """Dense matrix products in place of `op`, `key_scores` or `value_output`."""

    def bind(problem: Problem, dtype: torch.dtype | None = None) -> Callable[[], torch.Tensor]:
        dtype = dtype or problem.q.dtype
        if op == "key_scores":
            rows, k = group_rows(problem.q, problem.shape.kv_heads).to(dtype), problem.k.to(dtype)
            return lambda: dense_scores(rows, k)
        p, v = problem.p.to(dtype), problem.v.to(dtype)
        return lambda: dense_output(p, v)

    if device.type == "cuda":
        return [Peer("cublas", bind)]
    return [
        Peer("torch_matmul", lambda problem, d=dtype: bind(problem, d), variant=variant)
        for dtype, variant in _variants()
    ]


def topk_gather(x: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Exact pruning in plain PyTorch: the values of each row's largest magnitudes, by ascending channel."""
    channels = x.abs().topk(num_kept(sparsity, x.shape[-1]), dim=-1).indices
    return x.gather(-1, channels.sort(dim=-1).values)
