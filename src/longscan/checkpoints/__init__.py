"""Checkpoints: load every layout through one pipeline, save, convert and quantise."""
