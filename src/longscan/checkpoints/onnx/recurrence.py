"""The loops of a selective scan as ONNX has them: its Scan operator, whose body is one step.

The bodies are written in onnxscript, which reads this source. It is imported when a model is exported.
"""

# mypy: ignore-errors
# onnxscript is another language in Python's syntax

import onnxscript
from onnxscript import FLOAT, graph
from onnxscript import opset18 as op

__all__ = ["linear_steps", "scan_steps"]


@onnxscript.script()
def scan_steps(dt: FLOAT, x: FLOAT, A: FLOAT, B: FLOAT, C: FLOAT, h: FLOAT) -> FLOAT:
    """Return the outputs of all steps; see `decompose.scan_steps`."""

    @graph()
    def step(state, dt_t, x_t, B_t, C_t):
        state = op.Exp(dt_t * A) * state + x_t * B_t
        y = op.MatMul(C_t, state)
        return state, y

    _final, ys = op.Scan(h, dt, x, B, C, body=step, num_scan_inputs=4)
    return ys


@onnxscript.script()
def linear_steps(a: FLOAT, b: FLOAT, h: FLOAT) -> FLOAT:
    """Return the states after all steps; see `decompose.linear_steps`."""

    @graph()
    def step(state, a_t, b_t):
        state = a_t * state + b_t
        copy = op.Identity(state)
        return state, copy

    _final, states = op.Scan(h, a, b, body=step, num_scan_inputs=2)
    return states
