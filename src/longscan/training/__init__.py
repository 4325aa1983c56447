"""Training: the loop, one step, checkpoints, and a file per task."""
