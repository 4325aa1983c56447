"""Models on disk: every layout in, ours out."""
