"""VMamba, Vim and VideoMamba in transformers' Auto classes.

    from longscan.compat.transformers import register
    register()
    model = AutoModelForImageClassification.from_pretrained(DIRECTORY)   # that `longscan.save` wrote

config.json and the names of the tensors are longscan's own, in both directions. What transformers calls
differently is translated here: n_classes and labels are num_labels and id2label, images are pixel_values.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from longscan.core.optional import require
from longscan.models import MODELS
from longscan.models.common.vision import VisionConfig, VisionModel

__all__ = [
    "VMambaBackbone",
    "VMambaConfig",
    "VMambaForImageClassification",
    "VMambaModel",
    "VideoMambaBackbone",
    "VideoMambaConfig",
    "VideoMambaForImageClassification",
    "VideoMambaForVideoClassification",
    "VideoMambaModel",
    "VimBackbone",
    "VimConfig",
    "VimForImageClassification",
    "VimModel",
    "register",
]

PURPOSE = "transformers' Auto classes"
_hf: Any = require("transformers", PURPOSE)
_backbones: Any = require("transformers", PURPOSE, "transformers.backbone_utils")
_init: Any = require("transformers", PURPOSE, "transformers.initialization")
_outputs: Any = require("transformers", PURPOSE, "transformers.modeling_outputs")

PREFIX = "network"
DEFAULT_LABEL = "LABEL_{}"  # of transformers, where classes have no names


class LongscanVisionConfig(_backbones.BackboneConfigMixin, _hf.PreTrainedConfig):  # type: ignore[misc, unused-ignore]
    """A Config of longscan under transformers' interface: its fields are attributes here.

    Args:
        kwargs: fields of the model's Config and of transformers' own; `num_labels` or `id2label` have
            precedence over `n_classes` and `labels`.
    """

    attribute_map = {"num_channels": "in_channels"}  # noqa: RUF012
    required: ClassVar[dict[str, Any]] = {}  # where the model's Config has no default

    def __post_init__(self, **kwargs: Any) -> None:
        """Take the fields apart: the model's and transformers' own."""
        kwargs.pop("longscan", None)  # the version of the layout
        names = {field.name for field in dataclasses.fields(self.entry.config)} & kwargs.keys()
        fields = self.required | {name: kwargs.pop(name) for name in names}
        features, indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        if getattr(self, "id2label", None) is None and kwargs.get("num_labels") is None:
            n_classes = fields.get("n_classes", VisionConfig.n_classes)
            labels = fields.get("labels") or [DEFAULT_LABEL.format(i) for i in range(n_classes)]
            names_of: Any = dict(enumerate(labels))
            self.id2label, self.label2id = names_of, {label: i for i, label in names_of.items()}
        super().__post_init__(**kwargs)
        fields = {name: value for name, value in fields.items() if name not in ("n_classes", "labels")}
        checked = self.entry.config.from_dict(fields).to_dict()
        self._fields = tuple(name for name in checked if name not in ("n_classes", "labels"))
        for name in self._fields:
            setattr(self, name, checked[name])
        widths = self.d_model if isinstance(self.d_model, list) else [self.d_model]
        self.hidden_sizes, self.hidden_size = widths, widths[-1]
        self.stage_names = [f"stage{i + 1}" for i in range(len(widths))]
        self.set_output_features_output_indices(features, indices)

    @property
    def entry(self) -> Any:
        """The model's entry in the registry."""
        return MODELS[self.model_type]

    def settings(self) -> VisionConfig:
        """Return the model's Config."""
        labels = [self.id2label[i] for i in range(self.num_labels)]
        if labels == [DEFAULT_LABEL.format(i) for i in range(self.num_labels)]:
            labels = []
        fields = {name: getattr(self, name) for name in self._fields}
        return cast(
            VisionConfig,
            self.entry.config.from_dict({**fields, "n_classes": self.num_labels, "labels": labels}),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json says: longscan's fields, and what transformers adds."""
        derived = ("_fields", "hidden_sizes", "hidden_size", "stage_names", "id2label", "label2id")
        rest = {name: value for name, value in super().to_dict().items() if name not in derived}
        return {**rest, "longscan": 1, **self.settings().to_dict()}


class _Network(_hf.PreTrainedModel):  # type: ignore[misc, unused-ignore]
    """A model of longscan under transformers' interface.

    Args:
        config: of the model.
    """

    base_model_prefix = PREFIX
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["VSSBlock", "VimBlock"]  # noqa: RUF012
    # the recurrence, whatever the dtype of the other weights
    _keep_in_fp32_modules_strict = [  # noqa: RUF012
        *("A_logs", "Ds", "dt_projs_bias", "A_log", "A_b_log", "D", "D_b", "dt_proj.bias", "dt_proj_b.bias")
    ]
    classifies = False

    def __init__(self, config: LongscanVisionConfig) -> None:
        super().__init__(config)
        network = config.entry.cls(config.settings())
        assert isinstance(network, VisionModel)
        if not self.classifies:
            network.set_submodule(network.head_name, nn.Identity())
            self._keys_to_ignore_on_load_unexpected = [rf"^({PREFIX}\.)?{network.head_name}\."]
        self.network = network
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a new head; the rest has its initialisation from longscan."""
        if isinstance(module, nn.Linear) and self.classifies and module is self.network.head_layer:
            _init.trunc_normal_(module.weight, std=0.02)
            _init.zeros_(module.bias)

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Load tensors by their names in a file or in this module."""
        own = {f"{PREFIX}.{name.removeprefix(f'{PREFIX}.')}": each for name, each in state_dict.items()}
        return super().load_state_dict(own, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save a directory that transformers and longscan open; see transformers."""
        state = kwargs.pop("state_dict", None) or self.state_dict()
        names = {name.removeprefix(f"{PREFIX}."): tensor for name, tensor in state.items()}
        return super().save_pretrained(save_directory, *args, state_dict=names, **kwargs)


class _Base(_Network):
    """The features: `AutoModel`."""

    def forward(self, pixel_values: Tensor, return_dict: bool | None = None, **kwargs: Any) -> Any:
        """Return last_hidden_state, as `VisionModel.forward_features` does, and pooler_output.

        Args:
            pixel_values: (batch, in_channels, height, width), normalised.
            return_dict: whether to return an object, not a tuple; None: as the config says.
            kwargs: of other models, such as output_attentions; ignored.
        """
        features = self.network.forward_features(pixel_values)
        output = _outputs.BaseModelOutputWithPooling(
            last_hidden_state=features, pooler_output=self.network.pool(features)
        )
        return output if _as_object(self, return_dict) else output.to_tuple()


class _Classifier(_Network):
    """The classifier: `AutoModelForImageClassification`."""

    classifies = True

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return loss, logits, and on request the feature maps of the stages.

        Args:
            pixel_values: (batch, in_channels, height, width), normalised.
            labels: (batch,) classes, or (batch, num_labels) for several labels; see `problem_type`.
            output_hidden_states: whether to return feature maps, finest first, which takes another pass.
            return_dict: see `_Base.forward`.
            kwargs: likewise.
        """
        logits = self.network(pixel_values)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        maps = tuple(self.network.feature_maps(pixel_values)) if wanted else None
        output = _outputs.ImageClassifierOutput(loss=loss, logits=logits, hidden_states=maps)
        return output if _as_object(self, return_dict) else output.to_tuple()


class _Backbone(_backbones.BackboneMixin, _Network):  # type: ignore[misc, unused-ignore]
    """The feature maps of the stages: `AutoBackbone`."""

    has_attentions = False

    def __init__(self, config: LongscanVisionConfig) -> None:
        super().__init__(config)
        self.num_features = list(config.hidden_sizes)

    def forward(self, pixel_values: Tensor, return_dict: bool | None = None, **kwargs: Any) -> Any:
        """Return feature_maps (batch, channels, height, width) of the stages in config.out_features.

        Args:
            pixel_values: (batch, in_channels, height, width), normalised.
            return_dict: see `_Base.forward`.
            kwargs: likewise.
        """
        maps = zip(self.stage_names, self.network.feature_maps(pixel_values), strict=True)
        output = _outputs.BackboneOutput(
            feature_maps=tuple(each for name, each in maps if name in self.out_features)
        )
        return output if _as_object(self, return_dict) else output.to_tuple()


def _as_object(model: Any, return_dict: bool | None) -> bool:
    return bool(model.config.return_dict if return_dict is None else return_dict)


class VMambaConfig(LongscanVisionConfig):
    """The configuration of a VMamba."""

    model_type = "vmamba"


class VimConfig(LongscanVisionConfig):
    """The configuration of a Vision Mamba; by default that of vim_tiny."""

    model_type = "vim"
    required: ClassVar[dict[str, Any]] = {"d_model": 192, "n_layers": 24}


class VideoMambaConfig(LongscanVisionConfig):
    """The configuration of a VideoMamba; by default that of videomamba_tiny, of images."""

    model_type = "videomamba"
    required: ClassVar[dict[str, Any]] = {"d_model": 192, "n_layers": 24}


class VMambaModel(_Base):
    """VMamba's features."""

    config_class = VMambaConfig


class VMambaForImageClassification(_Classifier):
    """VMamba."""

    config_class = VMambaConfig


class VMambaBackbone(_Backbone):
    """VMamba's stages."""

    config_class = VMambaConfig


class VimModel(_Base):
    """Vim's features."""

    config_class = VimConfig


class VimForImageClassification(_Classifier):
    """Vim."""

    config_class = VimConfig


class VimBackbone(_Backbone):
    """Vim's patches after the last block, as one stage."""

    config_class = VimConfig


class VideoMambaModel(_Base):
    """VideoMamba's features."""

    config_class = VideoMambaConfig


class VideoMambaForImageClassification(_Classifier):
    """VideoMamba without frames."""

    config_class = VideoMambaConfig


class VideoMambaBackbone(_Backbone):
    """VideoMamba's patches after the last block, as one stage; of images."""

    config_class = VideoMambaConfig


class VideoMambaForVideoClassification(_Classifier):
    """VideoMamba; videos have transformers' order of axes."""

    config_class = VideoMambaConfig

    def forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return as the base class; pixel_values is (batch, n_frames, in_channels, height, width)."""
        return super().forward(pixel_values.transpose(1, 2), *args, **kwargs)


CLASSES = (
    (VMambaConfig, VMambaModel, VMambaForImageClassification, VMambaBackbone),
    (VimConfig, VimModel, VimForImageClassification, VimBackbone),
    (VideoMambaConfig, VideoMambaModel, VideoMambaForImageClassification, VideoMambaBackbone),
)


def register() -> None:
    """Register the models with AutoConfig, AutoModel, AutoBackbone, AutoModelForImageClassification,
    AutoModelForVideoClassification and AutoImageProcessor; a second call changes nothing.
    """  # noqa: D205
    processor = require("transformers", PURPOSE, "transformers.models.bit").BitImageProcessorPil
    for config, model, classifier, backbone in CLASSES:
        _hf.AutoConfig.register(config.model_type, config, exist_ok=True)
        _hf.AutoModel.register(config, model, exist_ok=True)
        _hf.AutoModelForImageClassification.register(config, classifier, exist_ok=True)
        _hf.AutoBackbone.register(config, backbone, exist_ok=True)
        _hf.AutoImageProcessor.register(config, image_processor_classes={"pil": processor}, exist_ok=True)
    video = VideoMambaForVideoClassification
    _hf.AutoModelForVideoClassification.register(VideoMambaConfig, video, exist_ok=True)
