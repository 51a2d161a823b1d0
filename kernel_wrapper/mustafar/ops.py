"""The public ops on `CompressedTensor`, and what torch.compile needs to know of them.

Each op is `torch.ops.mustafar.<name>`: schema and checks in csrc/, kernels in kernel/csrc (CUDA), kernel/cpu (C++)
and kernel/compression.py (Triton, where the extension has no CUDA). `mustafar.reference` has the plain PyTorch twin.

B batch, H query heads, Hkv KV heads (G = H / Hkv), T tokens, D head dim, S slices of 64 tokens, W bitmap words.
"""

from __future__ import annotations

import torch

from mustafar import _native
from mustafar.format import SLICE_TOKENS, VECTOR_VALUES, CompressedTensor, slices_for, width_for, words_for

_native.load()
_ops = torch.ops.mustafar

Optional = torch.Tensor | None

#: Entries of the counters of a static cache that Python reads; kernel/window.h has them all.
WINDOW_PACKED, WINDOW_HELD, WINDOW_PRUNED, WINDOW_OVERFLOW, WINDOW_ENTRIES = 0, 1, 2, 7, 8


def _check_devices(name: str, first: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Refuse arguments on a GPU whose first one, by which the kernels choose theirs, is elsewhere.

    Raises
    ------
    ValueError
        Naming both; what lies elsewhere than a first argument on a GPU is refused by the op.
    """
    if first.is_cuda:
        return
    for other, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(
                f"{other}.device: expected {first.device} like {name}, got {tensor.device}: all arguments must be "
                "on one device"
            )


def prune_compress(x: torch.Tensor, k: int) -> CompressedTensor:
    """Keep the `k` largest magnitudes of every row and pack them (uniform layout).

    Per-token magnitude pruning, paper section 3.2. Ties go to the lowest channel; NaN ranks above infinity.

    Parameters
    ----------
    x : Tensor [B, Hkv, T, D]
        float16 or bfloat16, float32 on a CPU; the last dim contiguous.
    k : int
        Values kept per row, 1 to D (`mustafar.num_kept`).
    """
    bitmap, values = _ops.prune_compress(x, k)
    return CompressedTensor(bitmap, values, None, None, x.shape[2], x.shape[3])


def compress(x: torch.Tensor) -> CompressedTensor:
    """Pack the non-zeros of x [B, Hkv, T, D] (NaN included), whatever their pattern (general layout).

    The size depends on the data, so on a GPU this synchronises with the host once.
    """
    bitmap, values, offsets, widths = _ops.compress(x)
    return CompressedTensor(bitmap, values, offsets, widths, x.shape[2], x.shape[3])


def decompress(c: CompressedTensor) -> torch.Tensor:
    """The dense tensor [B, Hkv, T, D], bit for bit what was kept and zeros elsewhere."""
    return _ops.decompress(c.bitmap, c.values, c.offsets, c.widths, c.tokens, c.head_dim)


def key_scores(q: torch.Tensor, c: CompressedTensor) -> torch.Tensor:
    """q [B, H, D] times the compressed keys of its KV head: [B, H, T] in q's dtype, not scaled.

    The first of the paper's two batched SpMVs (section 4): load compressed, compute dense, float32 sums.
    """
    _check_devices("q", q, c=c.bitmap)
    return _ops.key_scores(q, c.bitmap, c.values, c.offsets, c.widths, c.tokens)


def value_output(p: torch.Tensor, c: CompressedTensor) -> torch.Tensor:
    """p [B, H, T] times the compressed values of its KV head: [B, H, D] in p's dtype. The second SpMV."""
    if p.dim() == 3 and p.shape[2] != c.tokens:
        raise ValueError(f"p.shape: expected {c.tokens} tokens in the last dim, got {tuple(p.shape)}")
    _check_devices("p", p, c=c.bitmap)
    return _ops.value_output(p, c.bitmap, c.values, c.offsets, c.widths, c.head_dim)


def decode_attention(
    q: torch.Tensor,
    k: CompressedTensor,
    v: CompressedTensor,
    k_window: torch.Tensor,
    v_window: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor | None = None,
    scale: float | None = None,
    sliding_window: int = 0,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one new token per sequence over the compressed cache and the dense local window.

    Parameters
    ----------
    q : Tensor [B, H, D]
    k, v : CompressedTensor of [B, Hkv, T, D]
        Widths and layouts may differ.
    k_window, v_window : Tensor [B, Hkv, capacity, D]
        The dense tokens that follow the compressed ones; capacity may be 0.
    lengths : Tensor, int32 [B, 2]
        Compressed tokens and window tokens of each sequence, on q's device.
    starts : Tensor, int32 [B], optional
        Positions before it are padding. Positions count the compressed tokens first, then the window's.
    scale : float, optional
        Of q . k; 1 / sqrt(D) by default.
    sliding_window : int
        Only the last `sliding_window` positions are visible; 0 for all.
    workspace : Tensor, optional
        From `decode_attention_workspace`; needed inside a CUDA graph capture, allocated otherwise.

    Returns
    -------
    Tensor [B, H, D] in q's dtype. A sequence with nothing visible gives zeros.
    """
    _check_devices(
        "q", q, k=k.bitmap, v=v.bitmap, k_window=k_window, v_window=v_window, lengths=lengths, starts=starts
    )
    return _ops.decode_attention(
        q, k.bitmap, k.values, k.offsets, k.widths, v.bitmap, v.values, v.offsets, v.widths,
        k_window, v_window, lengths, starts, q.shape[-1] ** -0.5 if scale is None else scale, sliding_window,
        workspace,
    )  # fmt: skip


def decode_attention_workspace(
    q: torch.Tensor, kv_heads: int, slices: int, window_capacity: int
) -> torch.Tensor:
    """Memory for `decode_attention` of queries like `q` [B, H, D] over up to `slices` slices of 64 tokens."""
    with torch.cuda.device(q.device if q.is_cuda else -1):
        size = _ops.decode_attention_workspace_size(
            *q.shape[:2], kv_heads, q.shape[2], slices, window_capacity
        )
    return torch.empty(size, dtype=torch.uint8, device=q.device)


def window_advance(
    state: torch.Tensor,
    lengths: torch.Tensor,
    total: torch.Tensor,
    residual: int,
    flush_every: int,
    max_length: int,
) -> None:
    """Count one more token of a static cache, in place and on its device; kernel/window.h names the counters.

    Parameters
    ----------
    state : Tensor, int32 [WINDOW_ENTRIES]
        The counters, and what this step does: read by `window_append`.
    lengths : Tensor, int32 [B, 2]
        Set to the compressed and the window tokens of every sequence, as `decode_attention` takes them.
    total : Tensor, int64, one element
        Set to the tokens held.
    residual, flush_every : int
        When `flush_every` tokens have gathered beyond `residual`, the step prunes all but `residual` first.
    max_length : int
        A token beyond it is dropped and counted in ``state[WINDOW_OVERFLOW]``.
    """
    _check_devices("state", state, lengths=lengths, total=total)
    _ops.window_advance(state, lengths, total, residual, flush_every, max_length)


def window_append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_store: CompressedTensor,
    v_store: CompressedTensor,
    k_window: torch.Tensor,
    v_window: torch.Tensor,
    state: torch.Tensor,
    k_kept: int,
    v_kept: int,
) -> None:
    """Do to one layer of a static cache what `window_advance` decided, in place, without the host.

    Parameters
    ----------
    k, v : Tensor [B, Hkv, 1, D]
        The token to add.
    k_store, v_store : CompressedTensor
        Room for all slices, uniform layout, for `k_kept` and `v_kept` values per row.
    k_window, v_window : Tensor [B, Hkv, capacity, D]
    state : Tensor, int32 [WINDOW_ENTRIES]
    k_kept, v_kept : int
        Values kept per pruned row, as in `prune_compress`.
    """
    _check_devices(
        "k", k, v=v, k_store=k_store.bitmap, v_store=v_store.bitmap, k_window=k_window, v_window=v_window,
        state=state, **{"k_store.values": k_store.values, "v_store.values": v_store.values},
    )  # fmt: skip
    if k_store.offsets is not None or v_store.offsets is not None:
        wrong = "k_store" if k_store.offsets is not None else "v_store"
        raise ValueError(f"{wrong}: expected the uniform layout, got the general one")
    _ops.window_append(
        k, v, k_store.bitmap, k_store.values, v_store.bitmap, v_store.values, k_window, v_window, state,
        k_kept, v_kept,
    )  # fmt: skip


def _fake_bitmap(x: torch.Tensor) -> torch.Tensor:
    b, h, t, d = x.shape
    return x.new_empty((b, h, slices_for(t), SLICE_TOKENS, words_for(d)), dtype=torch.int64)


@torch.library.register_fake("mustafar::prune_compress")
def _(x: torch.Tensor, k: int):
    b, h, t, _ = x.shape
    vectors = width_for(k) // VECTOR_VALUES
    return _fake_bitmap(x), x.new_empty((b, h, slices_for(t), vectors, SLICE_TOKENS, VECTOR_VALUES))


@torch.library.register_fake("mustafar::compress")
def _(x: torch.Tensor):
    b, h, t, _ = x.shape
    size = torch.library.get_ctx().new_dynamic_size()
    table = (b, h, slices_for(t))
    return (
        _fake_bitmap(x),
        x.new_empty(size),
        x.new_empty(table, dtype=torch.int64),
        x.new_empty(table, dtype=torch.int32),
    )


@torch.library.register_fake("mustafar::decompress")
def _(
    bitmap: torch.Tensor,
    values: torch.Tensor,
    offsets: Optional,
    widths: Optional,
    tokens: int,
    head_dim: int,
):
    return values.new_empty((bitmap.shape[0], bitmap.shape[1], tokens, head_dim))


@torch.library.register_fake("mustafar::key_scores")
def _(
    q: torch.Tensor,
    bitmap: torch.Tensor,
    values: torch.Tensor,
    offsets: Optional,
    widths: Optional,
    tokens: int,
):
    return q.new_empty((q.shape[0], q.shape[1], tokens))


@torch.library.register_fake("mustafar::value_output")
def _(
    p: torch.Tensor,
    bitmap: torch.Tensor,
    values: torch.Tensor,
    offsets: Optional,
    widths: Optional,
    head_dim: int,
):
    return p.new_empty((p.shape[0], p.shape[1], head_dim))


@torch.library.register_fake("mustafar::decode_attention")
def _(q: torch.Tensor, *args):
    return q.new_empty(q.shape)


@torch.library.register_fake("mustafar::window_advance")
def _(*args) -> None:
    return None


@torch.library.register_fake("mustafar::window_append")
def _(*args) -> None:
    return None


def _register_triton() -> None:
    """Where torch has CUDA but the extension was built without, compression on a GPU is Triton, if it is there."""
    if _ops.has_cuda() or torch.version.cuda is None:
        return
    try:
        from mustafar.kernel import compression
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return
    for name in ("prune_compress", "compress", "decompress"):
        torch.library.impl(f"mustafar::{name}", "CUDA")(getattr(compression, name))


_register_triton()
