"""Selection against the oracle and against loops written out here; the registry's errors."""

from __future__ import annotations

import pytest
import torch
from cases import PATTERNS, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from mustafar import ops, pruning, reference
from mustafar.format import num_kept
from mustafar.pruning import Pruning, Rule, get_rule, keep_top
from tiny_models import one_thread

__all__ = ["one_thread"]


def _with_specials(x: torch.Tensor) -> torch.Tensor:
    """NaN of either sign, infinities and ties among them, in every other row."""
    x = x.clone()
    x[:, :, ::2, 1::7] = torch.inf
    x[:, :, ::2, 2::7] = -torch.inf
    x[:, :, ::4, 3::11] = torch.nan
    x[:, :, ::4, 5::11] = -torch.nan
    return x


def _keep_by_hand(score: list[float], kept: int) -> list[bool]:
    """Sort by (NaN first, larger first, lower index first) and take the first `kept`."""

    def rank(i: int) -> tuple[bool, float, int]:
        nan = score[i] != score[i]
        return (not nan, 0.0 if nan else -score[i], i)

    chosen = set(sorted(range(len(score)), key=rank)[:kept])
    return [i in chosen for i in range(len(score))]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("specials", [False, True])
def test_magnitude_equals_reference_and_kernel(target: tuple, pattern: str, specials: bool) -> None:
    device, dtype = target
    x = rows(pattern, 2, 2, 70, 128).to(dtype)
    x = (_with_specials(x) if specials else x).to(device)
    for sparsity in (0.0, 0.3, 0.5, 0.7, 0.95):
        kept = num_kept(sparsity, 128)
        keep = keep_top(x.abs(), sparsity)
        assert torch.equal(keep.sum(-1), torch.full_like(keep.sum(-1), kept))
        assert torch.equal(keep, reference.magnitude_keep(x, kept))
        assert torch.equal(keep, reference.keep_mask(ops.prune_compress(x, kept)))


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 13),
    channels=st.integers(1, 9),
    group=st.integers(1, 6),
    dim=st.sampled_from(["channel", "token"]),
    sparsity=st.floats(0, 0.99),
    seed=st.integers(0, 999),
)
def test_keep_top_equals_a_loop(
    tokens: int, channels: int, group: int, dim: str, sparsity: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    choices = torch.tensor([0.0, -0.0, 1.0, 2.0, torch.inf, torch.nan, -torch.nan])
    score = choices[torch.randint(0, len(choices), (tokens, channels), generator=generator)]
    expected = torch.zeros(tokens, channels, dtype=torch.bool)
    if dim == "channel":
        for t in range(tokens):
            expected[t] = torch.tensor(_keep_by_hand(score[t].tolist(), num_kept(sparsity, channels)))
    else:
        for c in range(channels):
            for first in range(0, tokens, group):
                part = score[first : first + group, c].tolist()
                kept = _keep_by_hand(part, num_kept(sparsity, len(part)))
                expected[first : first + group, c] = torch.tensor(kept)
    assert torch.equal(keep_top(score, sparsity, dim, group), expected)


def test_a_shared_score_prunes_the_same_channels_of_every_token() -> None:
    rule = Rule("Structured", "K", lambda x, window: x.abs().sum(dim=2, keepdim=True))
    x = torch.randn(2, 3, 40, 16)
    pruned = Pruning(rule, 0.5).prune(x)
    kept = pruned != 0
    assert torch.equal(kept, kept[:, :, :1].expand_as(kept))
    assert int(kept[0, 0, 0].sum()) == 8


def test_pruning_keeps_nan_and_copies() -> None:
    x = torch.randn(1, 1, 4, 8)
    x[0, 0, 1, 5] = torch.nan
    before = x.clone()
    pruned = Pruning(get_rule("Vt_Mag"), 0.75).prune(x)
    assert pruned[0, 0, 1, 5].isnan()
    assert torch.equal(x.nan_to_num(7), before.nan_to_num(7))
    assert int((pruned[0, 0, 0] != 0).sum()) == 2


def test_unknown_rule_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown rule 'Kt_Max'; valid: Kt_Mag.*Vt_Mag"):
        get_rule("Kt_Max")
    with pytest.raises(ValueError, match=r"unknown k_rule 'nope'; valid: Kt_Mag"):
        get_rule("nope", "K")


def test_a_rule_of_the_other_side_is_refused() -> None:
    with pytest.raises(ValueError, match=r"k_rule 'Vt_Mag' prunes values \(V\); valid: Kt_Mag"):
        get_rule("Vt_Mag", "K")
    with pytest.raises(ValueError, match=r"v_rule 'Kt_Mag' prunes keys \(K\)"):
        get_rule("Kt_Mag", "V")


@pytest.mark.parametrize("sparsity", [1.0, -0.1, "0.5", True, None])
def test_bad_sparsity_names_the_argument(sparsity: object) -> None:
    with pytest.raises(ValueError, match="v_sparsity is the fraction of zeros"):
        Pruning(get_rule("Vt_Mag"), sparsity)


def test_bad_ranking_arguments() -> None:
    score = torch.zeros(4, 4)
    with pytest.raises(ValueError, match="dim must be 'channel' or 'token'"):
        keep_top(score, 0.5, "head")
    with pytest.raises(ValueError, match="group is a number of tokens"):
        keep_top(score, 0.5, "token", 0)
    with pytest.raises(ValueError, match="group_size is a number of tokens"):
        Pruning(get_rule("Kt_Mag"), 0.5, group_size=0)
    with pytest.raises(ValueError, match="tensor must be 'K' or 'V'"):
        Rule("Q_Mag", "Q", pruning.rules.magnitude)
    with pytest.raises(ValueError, match="only a rule that ranks channels"):
        Rule("Kc_Mag", "K", pruning.rules.magnitude, dim="token", uniform=True)
