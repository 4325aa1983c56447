"""The Vision Transformer: the paper's equations, transformers' model, published sizes, other resolutions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.checkpoints.formats.vit import BARE
from longscan.checkpoints.load import load
from longscan.checkpoints.save import save
from longscan.errors import LongscanError
from longscan.models import ViT, ViTConfig
from longscan.models.vit import PRESETS

PUBLISHED = {  # with 1,000 classes at 224 pixels
    "vit_tiny": 5_717_416,
    "vit_small": 22_050_664,
    "vit_base": 86_567_656,
    "vit_base_patch32": 88_224_232,
    "vit_large": 304_326_632,
    "vit_large_patch32": 306_535_400,
    "vit_huge_patch14": 632_045_800,
}
SMALL = {"d_model": 24, "n_layers": 3, "n_heads": 4, "patch_size": 4, "image_size": 16, "n_classes": 5}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(**fields: Any) -> ViT:
    """A small model whose parameters are all different."""
    model, generator = ViT(ViTConfig.from_dict({**SMALL, **fields}), seeded()).eval(), seeded(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def images(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=seeded(2))


def literal(model: ViT, x: Tensor) -> Tensor:
    """The equations (1) to (4) of the paper, one head and one query at a time."""
    w, config = dict(model.named_parameters()), model.config
    size, d_head = config.patch_size, config.d_model // config.n_heads

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    rows = []
    for image in x:
        patches = [
            (w["patch_embed.proj.weight"] * image[:, i : i + size, j : j + size]).sum((1, 2, 3))
            + w["patch_embed.proj.bias"]
            for i in range(0, image.shape[1], size)
            for j in range(0, image.shape[2], size)
        ]
        z = torch.stack([w["cls_token"][0, 0], *patches]) + w["pos_embed"][0]
        for n in range(config.n_layers):
            q, k, v = linear(norm(z, f"blocks.{n}.norm1"), f"blocks.{n}.attn.qkv").chunk(3, -1)
            heads = []
            for h in range(config.n_heads):
                mine = slice(h * d_head, (h + 1) * d_head)
                weights = [((k[:, mine] @ query) / d_head**0.5).softmax(0) for query in q[:, mine]]
                heads.append(torch.stack([weight @ v[:, mine] for weight in weights]))
            z = z + linear(torch.cat(heads, -1), f"blocks.{n}.attn.proj")
            hidden = F.gelu(linear(norm(z, f"blocks.{n}.norm2"), f"blocks.{n}.mlp.fc1"))
            z = z + linear(hidden, f"blocks.{n}.mlp.fc2")
        rows.append(linear(norm(z, "norm")[0], "head"))
    return torch.stack(rows)


def test_it_is_the_paper_s_model() -> None:
    model, x = build().double(), images(16, 16).double().requires_grad_()
    ours, theirs = model(x), literal(model, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    leaves = [x, *model.parameters()]
    gradients = [torch.autograd.grad(out.sin().sum(), leaves) for out in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-9)


def test_transformers_computes_the_same_logits() -> None:
    transformers = pytest.importorskip("transformers")
    model, config = build(), build().config
    peer = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=config.d_model,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            intermediate_size=4 * config.d_model,
            image_size=config.image_size,
            patch_size=config.patch_size,
            layer_norm_eps=config.norm_eps,
            num_labels=config.n_classes,
        )
    ).eval()
    peer.load_state_dict(dict(zip(peer.state_dict(), _in_order(model, peer), strict=True)))
    with torch.inference_mode():
        ours, theirs = model(images(16, 16)), peer(images(16, 16)).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def _in_order(model: ViT, peer: torch.nn.Module) -> list[Tensor]:
    """Our tensors by the names of transformers, whatever it calls its modules in this version."""
    ours, parts = (
        model.state_dict(),
        {"query": 0, "key": 1, "value": 2, "q_proj": 0, "k_proj": 1, "v_proj": 2},
    )
    plain = {
        "cls_token": "cls_token",
        "position_embeddings": "pos_embed",
        "projection.weight": "patch_embed.proj.weight",
        "projection.bias": "patch_embed.proj.bias",
        "vit.layernorm.weight": "norm.weight",
        "vit.layernorm.bias": "norm.bias",
        "classifier.weight": "head.weight",
        "classifier.bias": "head.bias",
    }
    inside = {
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.output.dense": "attn.proj",
        "o_proj": "attn.proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    }
    found = []
    for name in peer.state_dict():
        known = next((value for ending, value in plain.items() if name.endswith(ending)), None)
        if known:
            found.append(ours[known])
            continue
        number = next(part for part in name.split(".") if part.isdecimal())
        kind = name.rpartition(".")[2]
        part = next((index for key, index in parts.items() if f".{key}." in name), None)
        if part is not None:
            found.append(ours[f"blocks.{number}.attn.qkv.{kind}"].chunk(3)[part])
            continue
        module = next(value for key, value in inside.items() if f".{key}." in name)
        found.append(ours[f"blocks.{number}.{module}.{kind}"])
    return found


@pytest.mark.parametrize("preset", PUBLISHED)
def test_the_published_sizes(preset: str) -> None:
    with torch.device("meta"):
        model = ViT(ViTConfig.from_dict(PRESETS[preset]))
    assert model.num_parameters() == PUBLISHED[preset]
    stored = model.state_dict()
    assert BARE.matches(stored)
    assert BARE.infer(stored) == model.config


def test_any_resolution_interpolates_the_positions() -> None:
    model, x = build(), images(24, 36)
    assert [tuple(x.shape) for x in model.feature_maps(x)] == [(2, 24, 6, 9)]
    assert model.forward_features(x).shape == (2, 1 + 54, 24)
    square = images(24, 24)
    before = model(square)
    model.resize(24)
    assert model.pos_embed.shape == (1, 1 + 36, 24)
    torch.testing.assert_close(model(square), before)
    own = build()
    own.resize(16)  # its own size
    assert torch.equal(own.pos_embed, build().pos_embed)
    with pytest.raises(ValueError, match="at least one patch"):
        model(images(3, 16))


def test_the_class_token_sees_every_patch() -> None:
    model, x = build(), images(16, 16).requires_grad_()
    model(x).sin().sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert bool((x.grad != 0).all())


def test_a_file_of_timm_s_names_says_what_it_is(tmp_path: Path) -> None:
    fields = {**PRESETS["vit_tiny"], "n_layers": 1, "n_classes": 3, "image_size": 48, "bias": False}
    model = ViT(ViTConfig.from_dict(fields), seeded()).eval()
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    again = load(tmp_path / "vit.pth", "image")
    assert again.config == model.config
    assert torch.equal(again(images(50, 40)), model(images(50, 40)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.weight": None}, "head.weight is missing: expected a classifier"),
        ({"pos_embed": torch.ones(1, 16, 192)}, "of a square of patches, got 16"),
        ({"pos_embed": torch.ones(1, 17, 190)}, "number of heads is known, 192, 384, .* got 190"),
        ({"dist_token": torch.ones(1, 1, 192)}, "unexpected: dist_token"),
        ({"blocks.0.mlp.fc1.weight": None}, "blocks.0.mlp.fc1.weight is missing"),
    ],
    ids=str,
)
def test_other_files_are_refused(change: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    fields = {**PRESETS["vit_tiny"], "n_layers": 1, "n_classes": 3, "patch_size": 4, "image_size": 16}
    stored = {**ViT(ViTConfig.from_dict(fields), seeded()).state_dict(), **change}
    torch.save({name: tensor for name, tensor in stored.items() if tensor is not None}, tmp_path / "a.pth")
    with pytest.raises(LongscanError, match=message):
        load(tmp_path / "a.pth", "image")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_heads": 5}, "a multiple and its divisor, got 24 and 5"),
        ({"patch_size": 17}, "at least one patch of patch_size, got 16 < 17"),
        ({"mlp_ratio": 0}, "mlp_ratio"),
    ],
)
def test_impossible_sizes(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(LongscanError, match=message):
        ViTConfig.from_dict({**SMALL, **fields})


def test_a_directory_is_none_of_transformers(tmp_path: Path) -> None:
    """Under the name "vit" transformers would open it with random weights."""
    model = ViT(ViTConfig(**{**PRESETS["tiny"], "n_classes": 4})).eval()
    save(model, tmp_path / "model")
    assert json.loads((tmp_path / "model/config.json").read_text())["model_type"] == "longscan_vit"
    assert not (tmp_path / "model/preprocessor_config.json").exists()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load(tmp_path / "model", "image")(images), model(images))


def test_no_images() -> None:
    with pytest.raises(ValueError, match="images: expected a non-empty batch"):
        ViT(ViTConfig(**PRESETS["tiny"]))(torch.zeros(0, 3, 32, 32))
