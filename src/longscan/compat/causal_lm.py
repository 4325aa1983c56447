"""Every language model of longscan in transformers: `generate`, `pipeline`, `Trainer`, PEFT.

    import longscan.hf
    model = AutoModelForCausalLM.from_pretrained(DIRECTORY)        # that `longscan.save` wrote
    model = longscan.hf.wrap(longscan.load("state-spaces/mamba-130m-hf")[0])

The state takes the place of a KV cache, and a step is one call of the native decoder. A directory in a
published layout, such as Mamba's, opens as transformers' own class; `wrap` gives ours.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from longscan.checkpoints.formats import FORMATS, format_of
from longscan.checkpoints.load import load
from longscan.checkpoints.save import padding_ids, save
from longscan.core.optional import require
from longscan.errors import LongscanError
from longscan.models import MODELS, LanguageModel, State, entry_of
from longscan.models.common.losses import count, next_tokens

__all__ = ["LongscanCache", "LongscanConfig", "LongscanForCausalLM", "register", "wrap"]

PURPOSE = "transformers' Auto classes"
_hf: Any = require("transformers", PURPOSE)
_cache: Any = require("transformers", PURPOSE, "transformers.cache_utils")
_outputs: Any = require("transformers", PURPOSE, "transformers.modeling_outputs")


class LongscanConfig(_hf.PreTrainedConfig):  # type: ignore[misc, unused-ignore]
    """A language model's Config under transformers' interface: its fields are attributes here.

    Args:
        kwargs: fields of the model's Config and of transformers' own.
    """

    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "tie_word_embeddings": "tie_embeddings",
    }
    name: ClassVar[str] = "lstm"  # of the model, in MODELS

    def __post_init__(self, **kwargs: Any) -> None:
        """Take the fields apart: the model's and transformers' own."""
        kwargs.pop("longscan", None)  # the version of the layout
        entry = MODELS[self.name]
        names = [field.name for field in dataclasses.fields(entry.config) if field.name in kwargs]
        fields = {name: kwargs.pop(name) for name in names}
        super().__post_init__(**kwargs)
        # transformers makes one without arguments, to compare with
        self._settings = entry.config.from_dict(fields or entry.presets["tiny"]).to_dict()
        for name, value in self._settings.items():
            setattr(self, name, value)

    def __reduce__(self) -> Any:
        """Pickle as the fields: the class is made when it is needed."""
        return _config, (self.name, self._settings)

    def settings(self) -> Any:
        """Return the model's Config."""
        return MODELS[self.name].config.from_dict({name: getattr(self, name) for name in self._settings})

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json says: longscan's fields, and what transformers adds."""
        rest = {name: value for name, value in super().to_dict().items() if name != "_settings"}
        return {**rest, **FORMATS[self.name].write(self.settings()), "model_type": self.model_type}


class LongscanCache(_cache.Cache):  # type: ignore[misc, unused-ignore]
    """The state of a model, in the form of a cache of transformers.

    Attributes:
        state: after the tokens so far; None before the first.
        length: of these tokens, padding included.
    """

    is_compileable = False

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.state: State | None = None
        self.length = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens it holds."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take rows, as beam search does.

        Args:
            beam_idx: (rows,) of the present ones.
        """
        if self.state is not None:
            self.state = self.state.select(beam_idx.tolist())

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row.

        Args:
            repeats: times.
        """
        if self.state is not None:
            self.state = self.state.fork(repeats)

    def crop(self, max_length: int) -> None:
        """Refuse: a state can't forget its last tokens.

        Raises:
            LongscanError: always.
        """
        raise LongscanError("a state has no last tokens to drop: assisted generation needs longscan's own.")


class LongscanForCausalLM(_hf.PreTrainedModel, _hf.GenerationMixin):  # type: ignore[misc, unused-ignore]
    """A language model under transformers' interface.

    Args:
        config: of the model.
        network: the model; a new one if None.
    """

    config_class = LongscanConfig
    base_model_prefix = "network"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _is_stateful = True  # no assisted generation: it would crop the cache
    _no_split_modules: ClassVar[list[str]] = ["Block"]

    def __init__(self, config: LongscanConfig, network: LanguageModel | None = None) -> None:
        super().__init__(config)
        if network is None:
            made = MODELS[config.name].cls(config.settings())
            assert isinstance(made, LanguageModel)
            network = made
        self.network = network
        self.post_init()

    @classmethod
    def from_pretrained(cls, name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a model as `longscan.load` does.

        Args:
            name_or_path: a directory, a hub id or a shipped model.
            args: none.
            kwargs: `dtype`, `revision`, `local_files_only`; of the others none that changes the model.

        Raises:
            LongscanError: as `longscan.load`.
        """
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
        for name in ("quantization_config", "load_in_8bit", "load_in_4bit", "state_dict"):
            if kwargs.get(name):
                raise LongscanError(f"{name}: not supported here. Quantise with `longscan quantize`.")
        network, _ = load(
            name_or_path,
            revision=kwargs.get("revision"),
            offline=bool(kwargs.get("local_files_only")),
            dtype=None if dtype == "auto" else dtype or torch.float32,
        )
        model = wrap(network)
        if isinstance(kwargs.get("generation_config"), _hf.GenerationConfig):
            model.generation_config = kwargs["generation_config"]
        return (model, {}) if kwargs.get("output_loading_info") else model

    def _init_weights(self, module: Any) -> None:
        """Leave it: the initialisation is longscan's."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: LongscanCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return loss, logits, the state as past_key_values, and on request the residual streams.

        Args:
            input_ids: (batch, seq_len) what follows the tokens that past_key_values holds.
            attention_mask: (batch, all tokens so far) 0 for padding, on either side.
            past_key_values: the state so far, moved on.
            labels: (batch, seq_len), -100 is ignored; position t predicts labels[t + 1].
            use_cache: whether to return the state, which training never does.
            output_hidden_states: whether to return the residual streams.
            return_dict: whether to return an object, not a tuple; None: as the config says.
            logits_to_keep: of the last positions; 0 for all. Or the positions.
            num_items_in_batch: labels in the whole batch of the optimizer, of which these are a part.
            kwargs: of other models, such as position_ids; ignored.

        Raises:
            LongscanError: there are no ids: vectors in their place are not supported.
        """
        if input_ids is None:
            raise LongscanError("input_ids: expected ids; inputs_embeds are not supported.")
        cache = past_key_values
        if not isinstance(cache, LongscanCache | None):
            raise LongscanError(f"past_key_values: expected a LongscanCache, got {type(cache).__name__}.")
        wanted = cache is not None or (use_cache and not self.training)
        state = None if cache is None else cache.state
        decodes = input_ids.shape[1] == 1 and not output_hidden_states and not torch.is_grad_enabled()
        if state is not None and decodes:
            logits, state = self.network.step(input_ids[:, 0].contiguous(), state)
            logits, loss, streams = logits[:, None], None, None
        else:
            mask = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
            seq_idx = None if mask is None or bool(mask.all()) else mask.to(torch.int64) - 1
            found = self.network(
                input_ids,
                state=state,
                seq_idx=seq_idx,
                labels=labels,
                return_hidden=bool(output_hidden_states),
            )
            logits, loss, state, streams = found.logits, found.loss, found.state, found.hidden
        # 0 keeps all
        positions = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep, None)
        logits = logits[:, positions, : self.network.config.vocab_size]
        if loss is not None and num_items_in_batch is not None:
            assert labels is not None
            loss = loss * count(next_tokens(labels, seq_idx)) / num_items_in_batch
        if wanted:
            cache = LongscanCache() if cache is None else cache
            cache.state, cache.length = state.detach(), cache.length + input_ids.shape[1]
        output = _outputs.CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=cache if wanted else None, hidden_states=streams
        )
        return (
            output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Put an empty state where transformers would put a KV cache."""
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = LongscanCache()

    def get_input_embeddings(self) -> Any:
        """Return the embedding."""
        return self.network.backbone.embedding

    def get_output_embeddings(self) -> Any:
        """Return the head, None if it is the embedding."""
        return self.network.lm_head

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse.

        Raises:
            LongscanError: always.
        """
        raise LongscanError("the vocabulary of a longscan model can't be changed.")

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Compute blocks again in the backward pass."""
        self.network.backbone.checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Retain what the backward pass needs."""
        self.network.backbone.checkpointing = False

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save a directory that longscan and transformers open, see `longscan.save`; without a tokenizer.

        Args:
            save_directory: created, or replaced if it is a model directory.
            args: none.
            kwargs: of transformers; of these only `state_dict` counts, tensors in place of the model's own.
        """
        network, tensors = self.network, kwargs.get("state_dict")
        if tensors is not None:
            network = copy.deepcopy(network)
            network.load_state_dict({name.removeprefix("network."): t for name, t in tensors.items()})
        save(network, save_directory)
        own = copy.deepcopy(self.generation_config)  # whose logits end with the vocabulary
        own.suppress_tokens = [*(own.suppress_tokens or ()), *padding_ids(network)] or None
        own.save_pretrained(save_directory)

    def __reduce__(self) -> Any:
        """Pickle as the model inside: the class is made when it is needed."""
        return wrap, (self.network,)

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Load tensors by their names in a file or in this module."""
        if not any(name.startswith("network.") for name in state_dict):
            inner = format_of(self.network).incoming(state_dict, self.network.config)
            state_dict = {f"network.{name}": tensor for name, tensor in inner.items()}
        return super().load_state_dict(state_dict, *args, **kwargs)


def wrap(model: LanguageModel) -> LongscanForCausalLM:
    """Return a language model under transformers' interface; both share the weights.

    Args:
        model: any.
    """
    config_class, model_class = _classes(entry_of(model).name)
    wrapped = model_class(config_class(**model.config.to_dict()), model)
    wrapped.train(model.training)
    return wrapped


def register(names: Sequence[str] = ()) -> None:
    """Register the language models with AutoConfig and AutoModelForCausalLM; a second call changes nothing.

    Args:
        names: of the models; all that transformers has no class for if none are given.
    """
    for name in names or [name for name, entry in MODELS.items() if entry.kind == "language"]:
        config_class, model_class = _classes(name)
        if config_class.model_type in _hf.CONFIG_MAPPING and not issubclass(
            _hf.CONFIG_MAPPING[config_class.model_type], LongscanConfig
        ):
            continue
        _hf.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        _hf.AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)


def _config(name: str, fields: dict[str, Any]) -> LongscanConfig:
    """Return the config of a model."""
    return _classes(name)[0](**fields)


@cache
def _classes(name: str) -> tuple[type[LongscanConfig], type[LongscanForCausalLM]]:
    """Return the classes of a model: its Config, and itself."""
    kind = MODELS[name].cls.__name__
    stated = FORMATS[name].write(MODELS[name].config.from_dict(MODELS[name].presets["tiny"]))["model_type"]
    config = type(f"Longscan{kind}Config", (LongscanConfig,), {"model_type": stated, "name": name})
    model = type(f"Longscan{kind}ForCausalLM", (LongscanForCausalLM,), {"config_class": config})
    return config, model
