"""The patched models: what their own cache generates, and what they refuse to load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from longbench_helpers import make_model
from model.llama import MustafarLlamaForCausalLM
from model.mistral import MustafarMistralForCausalLM
from mustafar.cache import MustafarCache
from transformers import AutoModelForCausalLM

CLASSES = {"llama": MustafarLlamaForCausalLM, "mistral": MustafarMistralForCausalLM}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=CLASSES)
def checkpoint(request, tmp_path_factory) -> tuple[type, Path]:
    """The class and a random checkpoint of it."""
    return CLASSES[request.param], make_model(tmp_path_factory.mktemp(request.param), request.param)


def generate(model, **options: object) -> torch.Tensor:
    ids = torch.randint(3, 30, (2, 150), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, :20], mask[1, :20] = 0, 0
    settings = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False, "attention_mask": mask}
    return model.generate(ids, **{**settings, **options})


def test_generate_makes_a_cache_each_time(checkpoint) -> None:
    cls, path = checkpoint
    tokens = {}
    for backend in ("kernel", "simulate"):
        model = cls.from_pretrained(path, k_sparsity=0.6, v_sparsity=0.7, residual_length=16, backend=backend)
        tokens[backend] = generate(model)
        assert torch.equal(tokens[backend], generate(model))
        cache = generate(model, return_dict_in_generate=True).past_key_values
        assert isinstance(cache, MustafarCache) and cache.settings.residual_length == 16
        assert cache.settings.keys.sparsity == 0.6 and cache.settings.values.sparsity == 0.7
    assert torch.equal(tokens["kernel"], tokens["simulate"])
    dense = AutoModelForCausalLM.from_pretrained(path)
    assert not torch.equal(tokens["kernel"], generate(dense)), "nothing was pruned"
    unpruned = cls.from_pretrained(path, k_sparsity=0.0, v_sparsity=0.0)
    assert torch.equal(generate(unpruned), generate(dense))
    assert torch.equal(generate(unpruned, num_beams=2), generate(dense, num_beams=2))


def test_a_given_cache_is_used(checkpoint) -> None:
    cls, path = checkpoint
    model = cls.from_pretrained(path, k_sparsity=0.9, v_sparsity=0.9)
    cache = MustafarCache(model.config, 0.0, 0.0)
    tokens = generate(model, past_key_values=cache)
    assert cache.get_seq_length() == tokens.shape[1] - 1
    assert torch.equal(tokens, generate(AutoModelForCausalLM.from_pretrained(path)))


def test_another_architecture_is_refused_before_loading(tmp_path) -> None:
    path = make_model(tmp_path / "qwen2", "qwen2")
    for file in path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(
        ValueError, match=r"MustafarLlama.* type 'llama', .* is of type 'qwen2': load it with"
    ):
        MustafarLlamaForCausalLM.from_pretrained(path, k_sparsity=0.5)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"k_sparsity": 1.5}, "k_sparsity is the fraction of zeros"),
        ({"v_rule": "Kt_Mag"}, "v_rule 'Kt_Mag' prunes keys"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
        ({"attn_implementation": "eager"}, "needs 'mustafar'; leave it out"),
    ],
)
def test_bad_arguments_are_refused(checkpoint, arguments: dict, message: str) -> None:
    cls, path = checkpoint
    with pytest.raises(ValueError, match=message):
        cls.from_pretrained(path, **arguments)


def test_generating_without_the_cache_is_refused(checkpoint) -> None:
    cls, path = checkpoint
    model = cls.from_pretrained(path)
    with pytest.raises(ValueError, match="use_cache=False: there is no cache to prune"):
        generate(model, use_cache=False)
    with pytest.raises(ValueError, match="cache_implementation='static': this model makes its own"):
        generate(model, cache_implementation="static")


def test_simulation_works_with_any_attention(checkpoint) -> None:
    cls, path = checkpoint
    eager = cls.from_pretrained(path, k_sparsity=0.6, backend="simulate", attn_implementation="eager")
    assert torch.equal(generate(eager), generate(cls.from_pretrained(path, k_sparsity=0.6)))
    assert eager.config._attn_implementation == "eager"
