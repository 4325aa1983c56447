"""timm's interface of VMamba, Vim and VideoMamba; the names of the tensors are longscan's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from torch.nn import functional as F

from longscan.checkpoints.formats import BARE
from longscan.checkpoints.load import load
from longscan.errors import LongscanError
from longscan.models import VideoMamba, Vim, VMamba
from longscan.models.common.layers import Linear, blank
from longscan.models.common.patch_tokens import join, resize, separate
from longscan.models.common.vision import VisionConfig, VisionModel, init_linear

__all__ = ["CLASSES", "TimmModel", "TimmVMamba", "TimmVideoMamba", "TimmVim", "filter_weights", "side"]


class TimmModel(VisionModel):
    """timm's interface of a model of images.

    Args:
        config: of the model.
        num_classes: outputs of the head; 0: the features.
        drop_rate: dropout before the head.
        global_pool: "avg" or "token", as the model pools; "" with num_classes 0: no pooling.
    """

    pooling: ClassVar[str]
    layers: nn.ModuleList

    def __init__(
        self, config: VisionConfig, num_classes: int, drop_rate: float, global_pool: str | None
    ) -> None:
        super().__init__(config)
        self.num_features = self.head_hidden_size = self.d_features
        self.in_chans, self.drop_rate = config.in_channels, drop_rate
        self.num_classes, self.global_pool = config.n_classes, self.pooling
        if num_classes != self.num_classes or global_pool not in (None, self.pooling):
            self.reset_classifier(num_classes, global_pool)

    # --- the head

    def get_classifier(self) -> nn.Module:
        """Return the head, an identity if there are no classes."""
        return self.get_submodule(self.head_name)

    def reset_classifier(  # type: ignore[override]
        self, num_classes: int, global_pool: str | None = None, **kwargs: Any
    ) -> None:
        """Replace the head.

        Args:
            num_classes: its outputs; 0 for none.
            global_pool: see the class; None: as it is.
            kwargs: of other models; ignored.

        Raises:
            LongscanError: the model has no such pooling.
        """
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in (self.pooling, "") or (not pool and num_classes):
            raise LongscanError(
                f"global_pool: expected {self.pooling!r}, or '' with num_classes=0, got {pool!r} with "
                f"num_classes={num_classes}."
            )
        head: nn.Module = nn.Identity()
        if num_classes:
            head = blank(Linear, self.d_features, num_classes).to(next(self.parameters()))
            init_linear(cast(nn.Linear, head))
            self.config = self.config.replace(n_classes=num_classes, labels=())
        self.set_submodule(self.head_name, head)
        self.num_classes, self.global_pool = num_classes, pool

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits (batch, num_classes) of features.

        Args:
            x: as `forward_features` returns them.
            pre_logits: whether to return the input of the head, (batch, num_features).
        """
        x = self.pool(x) if self.global_pool else x
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else cast(Tensor, self.get_classifier()(x))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (batch, num_classes) of images (batch, in_chans, height, width)."""
        return self.forward_head(self.forward_features(x))

    # --- feature maps

    def taps(self, x: Tensor, norm: bool) -> tuple[Tensor, list[Tensor]]:
        """Return the features, and the map (batch, channels, height, width) of each entry of feature_info.

        Args:
            x: images.
            norm: whether to normalise the maps by the last norm, where it fits.
        """
        raise NotImplementedError

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the features and chosen feature maps.

        Args:
            x: images.
            indices: of `feature_info`: several, a number of the last ones, or None for all.
            norm: see `taps`.
            stop_early: ignored; see `prune_intermediate_layers`.
            output_fmt: of the maps; "NCHW" only.
            intermediates_only: whether to return the maps alone.

        Raises:
            LongscanError: there is no such index or format.
        """
        if getattr(output_fmt, "value", output_fmt) != "NCHW":
            raise LongscanError(f"output_fmt: expected 'NCHW', got {output_fmt!r}.")
        taken = _indices(len(self.feature_info), indices)
        features, maps = self.taps(x, norm)
        chosen = [maps[i] for i in taken]
        return chosen if intermediates_only else (features, chosen)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what no chosen feature map depends on, and return the indices that are left.

        Args:
            indices: see `forward_intermediates`.
            prune_norm: whether to remove the last norm.
            prune_head: whether to remove the head.
        """
        taken = _indices(len(self.feature_info), indices)
        cut = max(taken) + 1 < len(self.layers)
        self.layers = self.layers[: max(taken) + 1]
        if cut and hasattr(self.layers[-1], "downsample"):
            self.layers[-1].downsample = nn.Identity()
        if prune_norm or cut:
            self.set_submodule(self.norm_name, nn.Identity())
        if prune_head or cut:
            self.reset_classifier(0, "")
        return taken

    @property
    def norm_name(self) -> str:
        """The name of the last norm."""
        return "classifier.norm" if isinstance(self, VMamba) else "norm_f"

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Channels, stride and module of each feature map, as timm has it."""
        raise NotImplementedError

    # --- training

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass, or not.

        Args:
            enable: whether to.
        """
        self.gradient_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that do not decay: those of the recurrences, and positions."""
        exempt = {id(parameter) for parameter in self.no_decay_parameters()}
        return {name for name, parameter in self.named_parameters() if id(parameter) in exempt}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns of layers, for learning rates that fall with depth.

        Args:
            coarse: whether a stage is one layer.
        """
        stem = r"^(?:patch_embed|pos_embed|temporal_pos_embedding|cls_token)"
        if not isinstance(self, VMamba):
            return {"stem": stem, "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))]}
        fine = [(r"^layers\.(\d+)\.downsample", (0,)), (r"^layers\.(\d+)\.blocks\.(\d+)", None)]
        fine.append((r"^classifier\.norm", (99999,)))
        return {"stem": stem, "blocks": r"^layers\.(\d+)" if coarse else fine}

    def set_input_size(self, img_size: int | Sequence[int] | None = None, **kwargs: Any) -> None:
        """Adapt learned positions to images of another size.

        Args:
            img_size: height and width.
            kwargs: of other models; ignored.
        """
        if img_size is not None:
            self.resize(side(img_size))

    # --- weights

    def load_pretrained(self, checkpoint_path: str, prefix: str = "") -> None:
        """Load a directory or file that `longscan.load` reads; timm calls it with custom_load=True.

        Args:
            checkpoint_path: of the weights; an entry "model" is preferred to averaged ones.
            prefix: ignored.
        """
        weights, wanted = load(checkpoint_path, "image", model=_name(self)).state_dict(), self.state_dict()
        for name in [name for name in weights if name.startswith(f"{self.head_name}.")]:
            if name not in wanted or wanted[name].shape != weights[name].shape:  # other classes
                del weights[name]
        for name in wanted.keys() - weights.keys():
            if name.startswith(f"{self.head_name}."):
                weights[name] = wanted[name]
        self.load_state_dict(weights)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load tensors by our names or those of the authors, positions of another size resized."""
        return super().load_state_dict(filter_weights(dict(state_dict), self), *args, **kwargs)


def filter_weights(state_dict: dict[str, Tensor], model: TimmModel) -> dict[str, Tensor]:
    """Return tensors by our names, in the shapes of a model.

    Args:
        state_dict: by our names or those of the authors.
        model: whose names and positions they get.
    """
    tensors = BARE[_name(model)].rename(state_dict)
    positions = tensors.get("pos_embed")
    if positions is not None and isinstance(model, Vim) and positions.shape != model.pos_embed.shape:
        where, grid = model.config.class_token, model.config.grid
        patches, classes = separate(positions, where)
        side = math.isqrt(patches.shape[1])
        maps = resize(patches.mT.reshape(1, -1, side, side), (grid, grid), "bicubic")
        tensors["pos_embed"] = join(maps.flatten(2).mT, classes, where)
    return tensors


class TimmVMamba(TimmModel, VMamba):
    """VMamba under timm's interface: a feature map a stage."""

    pooling = "avg"

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """See the base class."""
        config = self.config
        return [
            {"num_chs": width, "reduction": config.patch_size * 2**i, "module": f"layers.{i}"}
            for i, width in enumerate(config.d_model)
        ]

    def taps(self, x: Tensor, norm: bool) -> tuple[Tensor, list[Tensor]]:
        """See the base class."""
        maps = self.feature_maps(x)
        features = maps[-1]
        if norm and len(maps) == len(self.config.d_model):
            maps[-1] = self.classifier["norm"](features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return features, maps


class _Tokens(TimmModel):
    """What Vim and VideoMamba share: a feature map a block."""

    pooling = "token"
    config: Any

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """See the base class."""
        config = self.config
        return [
            {"num_chs": config.d_model, "reduction": config.step, "module": f"layers.{i}"}
            for i in range(config.n_layers)
        ]

    def taps(self, x: Tensor, norm: bool) -> tuple[Tensor, list[Tensor]]:
        """See the base class."""
        assert isinstance(self, Vim)
        tokens: dict[int, Tensor] = {}

        def hook(i: int) -> Callable[..., None]:
            return lambda module, inputs, output: tokens.update({i: output})

        handles = [layer.register_forward_hook(hook(i)) for i, layer in enumerate(self.layers)]
        try:
            features = self.forward_features(x)
        finally:
            for handle in handles:
                handle.remove()
        grid = self.patch_embed.grid(x)
        every = (self.norm_f(each) if norm else each for each in tokens.values())
        return features, [self.unflatten(separate(each, self.config.class_token)[0], grid) for each in every]


class TimmVim(_Tokens, Vim):
    """Vim under timm's interface."""


class TimmVideoMamba(_Tokens, VideoMamba):
    """VideoMamba, of images, under timm's interface."""


CLASSES: dict[str, type[TimmModel]] = {"vmamba": TimmVMamba, "vim": TimmVim, "videomamba": TimmVideoMamba}


def _name(model: TimmModel) -> str:
    """Return the name of a model in MODELS."""
    return next(name for name, cls in CLASSES.items() if isinstance(model, cls))


def side(img_size: int | Sequence[int]) -> int:
    """Return the side of a square image.

    Args:
        img_size: one number, or height and width.

    Raises:
        LongscanError: they differ.
    """
    sides = {img_size} if isinstance(img_size, int) else set(img_size)
    if len(sides) != 1:
        raise LongscanError(
            f"img_size: expected a square, got {img_size}. Images of other shapes need no setting."
        )
    return int(sides.pop())


def _indices(n: int, indices: int | Sequence[int] | None) -> list[int]:
    """Return the indices among n feature maps that timm means."""
    if indices is None or isinstance(indices, int):
        last = n if indices is None else indices
        indices = range(n - last, n)
    taken = [i + n if i < 0 else i for i in indices]
    if not taken or not all(0 <= i < n for i in taken):
        raise LongscanError(f"out_indices: expected numbers from {-n} to {n - 1}, got {list(indices)}.")
    return taken
