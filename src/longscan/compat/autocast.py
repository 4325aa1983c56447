"""mamba_ssm.utils.torch: decorators of functions with a backward pass of their own, under autocast."""

import functools

import torch

__all__ = ["custom_bwd", "custom_fwd"]

_device = "cuda" if torch.cuda.is_available() else "cpu"
custom_fwd = functools.partial(torch.amp.custom_fwd, device_type=_device)
custom_bwd = functools.partial(torch.amp.custom_bwd, device_type=_device)
