"""Importing this makes transformers' Auto classes know every language model here; see compat/causal_lm.py."""

from longscan.compat.causal_lm import LongscanForCausalLM, register, wrap

__all__ = ["LongscanForCausalLM", "register", "wrap"]

register()
