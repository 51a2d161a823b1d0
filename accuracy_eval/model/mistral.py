"""Mistral on a pruned KV cache."""

from transformers import MistralForCausalLM

from . import MustafarModel


class MustafarMistralForCausalLM(MustafarModel, MistralForCausalLM):
    """``MustafarMistralForCausalLM.from_pretrained(path, k_sparsity=0.7, v_sparsity=0.7)``, as any
    Mistral."""
