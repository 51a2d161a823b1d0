"""Llama on a pruned KV cache."""

from transformers import LlamaForCausalLM

from . import MustafarModel


class MustafarLlamaForCausalLM(MustafarModel, LlamaForCausalLM):
    """``MustafarLlamaForCausalLM.from_pretrained(path, k_sparsity=0.7, v_sparsity=0.7)``, then as any
    Llama."""
