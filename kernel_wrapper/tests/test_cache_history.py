"""Histories: any sequence of appends, prunes, crops and reorders equals the same done to a plain tensor."""

from __future__ import annotations

import pytest
import torch
from mustafar import ops
from mustafar.format import num_kept
from mustafar.history import DenseHistory, PackedHistory
from mustafar.pruning import RULES, Pruning, Rule
from mustafar.store import SliceStore
from tiny_models import one_thread

__all__ = ["one_thread"]


def weighted(x: torch.Tensor, window: torch.Tensor | None = None) -> torch.Tensor:
    return x.abs() * torch.arange(1, x.shape[-1] + 1, device=x.device)


def by_channel(x: torch.Tensor, window: torch.Tensor | None = None) -> torch.Tensor:
    return x.abs().sum(dim=2, keepdim=True)


CHOICES = {
    "fused": RULES["Kt_Mag"],
    "uniform": Rule("Kt_Weighted", "K", weighted, uniform=True),
    "token": Rule("Kc_Mag", "K", RULES["Kt_Mag"].score, dim="token"),
    "structured": Rule("K_Structured", "K", by_channel),
}


class Plain:
    """The oracle: one tensor, and how many of its tokens are pruned."""

    def __init__(self, pruning: Pruning, x: torch.Tensor) -> None:
        self.pruning, self.x, self.pruned = pruning, x[:, :, :0], 0

    def append(self, x: torch.Tensor) -> None:
        self.x = torch.cat([self.x, x], dim=2)

    def prune(self, pruned: int, behind: torch.Tensor | None = None) -> None:
        if behind is not None:
            self.append(behind)
        if pruned > self.pruned:
            self.x = self.x.clone()
            self.x[:, :, self.pruned : pruned] = self.pruning.prune(self.x[:, :, self.pruned : pruned])
            self.pruned = pruned

    def crop(self, tokens: int) -> None:
        self.x, self.pruned = self.x[:, :, :tokens], min(self.pruned, tokens)

    def select(self, rows) -> None:
        self.x = rows(self.x)


def _step(generator: torch.Generator, histories: list, batch: int, head_dim: int, dtype: torch.dtype) -> int:
    """Do one random thing to all of them; returns the batch size after it."""

    def pick(high: int, low: int = 0) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    plain = histories[0]
    tokens = plain.x.shape[2]
    action = pick(10)
    if action < 7:
        count = pick(3, 1) if action < 4 else pick(200, 1)
        x = torch.randn(batch, 2, count, head_dim, generator=generator).to(dtype)
        x[0, 0, 0, : pick(4)] = 0.0
        together = action == 6
        pruned = max(plain.pruned, tokens + (count if together else 0) - pick(80))
        for history in histories:
            if together:
                history.prune(pruned, behind=x)
            else:
                history.prune(pruned)
                history.append(x)
    elif action < 9 and tokens:
        keep = tokens - min(tokens - 1, pick(3, 1) if action == 7 else pick(tokens))
        for history in histories:
            history.crop(keep)
    else:
        index = torch.randint(0, batch, (pick(4, 1),), generator=generator)
        for history in histories:
            history.select(lambda x: x.index_select(0, index))
        return len(index)
    return batch


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("seed", range(4))
def test_any_sequence_equals_a_plain_tensor(name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    head_dim, dtype = ((24, torch.float32), (64, torch.float16), (80, torch.bfloat16), (128, torch.float32))[
        seed
    ]
    pruning = Pruning(CHOICES[name], 0.7, group_size=16)
    batch = 2
    like = torch.empty(batch, 2, 0, head_dim, dtype=dtype)
    histories = [Plain(pruning, like), DenseHistory(pruning, like, 40), PackedHistory(pruning, like, 40)]
    plain, simulated, packed = histories
    for _ in range(25):
        before = simulated.dense()
        copy = before.clone()
        batch = _step(generator, histories, batch, head_dim, dtype)
        assert torch.equal(before, copy), "what dense() returned has changed"
        assert simulated.tokens == packed.tokens == plain.x.shape[2]
        assert simulated.pruned == packed.pruned == plain.pruned
        assert packed.packed_tokens == plain.pruned // 64 * 64
        assert torch.equal(simulated.dense(), plain.x)
        assert torch.equal(packed.dense(), plain.x)
        packed.packed().validate()


def test_uniform_packing_keeps_exactly_k_bits_of_every_token() -> None:
    pruning = Pruning(CHOICES["fused"], 0.7)
    history = PackedHistory(pruning, torch.empty(1, 2, 0, 128), 351)
    history.prune(150, behind=torch.randn(1, 2, 182, 128))
    history.prune(406, behind=torch.randn(1, 2, 256, 128))  # starts from 22 pruned tokens in the window
    bits = torch.stack([(history.packed().bitmap >> i) & 1 for i in range(64)]).sum((0, -1))
    assert history.packed_tokens == 384 and history.window_tokens == 54
    assert torch.equal(bits, torch.full_like(bits, num_kept(0.7, 128)))


def test_store_grows_by_a_bounded_number_of_copies() -> None:
    x = torch.randn(1, 1, 256, 64)
    store = SliceStore(x, 32)
    moves, place = 0, None
    for _ in range(100):
        store.append(ops.prune_compress(x, 32))
        moves += store.values.data_ptr() != place
        place = store.values.data_ptr()
    assert store.tokens == 25600 and moves < 25
    assert store.allocated_bytes() < 1.3 * store.used_bytes()


def test_general_store_reuses_room_after_a_crop() -> None:
    x = torch.randn(1, 1, 256, 64)
    store = SliceStore(x, None)
    for _ in range(20):
        store.append(ops.compress(x))
        store.truncate(1)
    assert store.values.numel() <= 5 * 64 * 64
    assert torch.equal(ops.decompress(store.view()), x[:, :, :64])


def test_store_takes_whole_slices_only() -> None:
    store = SliceStore(torch.empty(1, 1, 0, 64), 32)
    with pytest.raises(ValueError, match="whole slices"):
        store.append(ops.prune_compress(torch.randn(1, 1, 65, 64), 32))
