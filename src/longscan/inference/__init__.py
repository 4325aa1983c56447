"""Inference: generate, translate, classify, embed, remember."""
