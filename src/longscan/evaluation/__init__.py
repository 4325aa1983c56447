"""Measure a model: perplexity, BLEU, accuracy."""
