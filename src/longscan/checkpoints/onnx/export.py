"""Write an image or video classifier as an ONNX file, and compare what ONNX Runtime computes with the model.

The batch size is free; height, width and the number of frames are those of the model's Config. The input is
normalised as for the model itself: its mean, std, crop and labels are in the file's metadata.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from longscan.checkpoints.onnx.decompose import DECOMPOSITIONS, LINEAR_STEPS, SCAN_STEPS
from longscan.core.files import atomic_file, writing
from longscan.core.optional import require
from longscan.errors import LongscanError
from longscan.models import entry_of
from longscan.models.common.vision import VisionModel

__all__ = ["Exported", "save_onnx"]

INPUT, OUTPUT = "pixel_values", "logits"  # as transformers and optimum call them
PURPOSE = "ONNX files"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MAX_BYTES = 2**31 - 2**24  # of weights: protobuf ends at 2 GB, the graph is in there too
TOLERANCE = 1e-4  # of the largest logit; float32 rounding gives about 1e-6


class Exported(NamedTuple):
    """What was written.

    Attributes:
        shape: of an input, without the batch.
        opset: version of ONNX's operators.
        difference: the largest, between logits of ONNX Runtime and the model, as a fraction of the largest
            logit.
    """

    shape: tuple[int, ...]
    opset: int
    difference: float


def save_onnx(model: VisionModel, path: str | Path, *, new: bool = False) -> Exported:
    """Write a classifier as an ONNX file in float32, whole or not at all.

    Args:
        model: of images or videos; it does not change.
        path: the file to create or replace.
        new: whether an existing file is refused.

    Raises:
        LongscanError: a package is missing; the weights exceed the 2 GB of an ONNX file; ONNX Runtime
            computes something else; another process is writing the file; or it exists, and `new` is set.
        OSError: the file cannot be written.
    """
    n_bytes = 4 * model.num_parameters()
    if n_bytes > MAX_BYTES:
        raise LongscanError(
            f"{path}: expected at most {MAX_BYTES:,} bytes of weights, which one ONNX file holds, got "
            f"{n_bytes:,}. Export a smaller model."
        )
    for package in PACKAGES:
        require(package, PURPOSE)
    model = copy.deepcopy(model).cpu().float().eval()
    images = torch.rand(2, *model.input_shape, generator=torch.Generator().manual_seed(0))
    program = _export(model, images)
    program.model.metadata_props.update(_metadata(model))
    with atomic_file(path, exclusive=True, new=new) as temporary:
        with writing(path):
            program.save(str(temporary), external_data=False)
        difference = _difference(model, images, temporary)
        if not difference <= TOLERANCE:
            raise LongscanError(
                f"{path}: the logits of ONNX Runtime differ from the model's by {difference:.1e} of the "
                f"largest, expected at most {TOLERANCE:.0e}. The file was not written; please report this."
            )
    return Exported(model.input_shape, program.model.opset_imports[""], difference)


class _Decomposed(TorchFunctionMode):
    """Replaces ops of ours, as a model is traced, by what they are made of."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _MADE_OF.get(func, func)(*args, **(kwargs or {}))


# a call may name the op or its one overload
_MADE_OF = {**DECOMPOSITIONS, **{op.overloadpacket: made for op, made in DECOMPOSITIONS.items()}}


def _export(model: VisionModel, images: Tensor) -> Any:
    """Return torch's ONNXProgram of a model, with a free batch size."""
    from longscan.checkpoints.onnx import recurrence  # which needs onnxscript

    shapes = ({0: torch.export.Dim("batch")},)
    with _silent(), torch.no_grad():
        with _Decomposed():
            traced = torch.export.export(model, (images,), dynamic_shapes=shapes)
        program: Any = torch.onnx.export(
            traced,
            dynamo=True,
            verbose=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: "batch"},),  # its name in the file
            custom_translation_table={
                SCAN_STEPS: recurrence.scan_steps,
                LINEAR_STEPS: recurrence.linear_steps,
            },
        )
    _strip(program.model)
    return program


def _strip(model: Any) -> None:
    """Remove what torch's exporter notes beside every node, paths on this machine among it."""
    traversal = require("onnxscript", PURPOSE, "onnx_ir").traversal
    graph = model.graph
    noted = [graph, *graph.inputs, *graph.outputs, *graph.initializers.values()]
    for node in traversal.RecursiveGraphIterator(graph):
        noted += [node, *node.outputs]
    for each in noted:
        each.metadata_props.clear()
        each.doc_string = None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Hide what torch's exporter says of packages that are not needed, and of its own deprecations."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _metadata(model: VisionModel) -> dict[str, str]:
    """Return what a user of the file has to know: text, lists as JSON."""
    config = model.config
    names = ("image_size", "mean", "std", "crop", "labels")
    return {
        "model": entry_of(model).name,
        **{name: json.dumps(getattr(config, name), ensure_ascii=False) for name in names},
    }


def _difference(model: VisionModel, images: Tensor, path: Path) -> float:
    """Return the largest difference between the logits of a file and a model, relative to the largest."""
    runtime = require("onnxruntime", PURPOSE)
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    images = images[:1]  # another batch size than the one that was traced
    with torch.no_grad():
        expected = model(images)
    (got,) = session.run([OUTPUT], {INPUT: images.numpy()})
    return float((torch.from_numpy(got) - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
