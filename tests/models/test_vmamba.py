"""VMamba: SS2D against a literal recurrence over pixels, the published sizes, and what stays the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.errors import LongscanError
from longscan.models import VMamba, VMambaConfig
from longscan.models.vmamba import PRESETS, SS2D

PUBLISHED = {  # parameters, tensors
    "vanilla_vmamba_tiny": (22_893_448, 212),
    "vanilla_vmamba_small": (44_417_416, 446),
    "vanilla_vmamba_base": (76_254_056, 446),
    "vmamba_tiny_s2l5": (30_705_832, 222),
    "vmamba_small_s2l15": (50_147_752, 402),
    "vmamba_base_s2l15": (88_557_800, 402),
    "vmamba_tiny_s1l8": (30_249_064, 276),
    "vmamba_small_s1l20": (49_012_840, 492),
    "vmamba_base_s1l20": (86_614_504, 492),
}
VANILLA: dict[str, Any] = {
    **{"d_state": 3, "expand": 2.0, "gate": "silu", "conv_bias": True, "mlp_ratio": 0.0},
    **{"patch_embed": "v1", "downsample": "v1"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "v2": {},
    "vanilla": VANILLA,
    "linear-gate": {"gate": "linear", "downsample": "v2", "dt_rank": 3},
    "no-conv": {"d_conv": 1, "expand": 1.5},
    "bidirectional": {"scan": "bidirectional"},
    "unidirectional": {"scan": "unidirectional"},
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(**fields: Any) -> VMamba:
    """A tiny model whose every parameter matters."""
    model = VMamba(VMambaConfig.from_dict({**PRESETS["tiny"], **fields}), generator=seeded())
    g = seeded(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=g)
    return model.eval()


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=seeded(2), dtype=torch.float64).to(dtype)


# SS2D, pixel by pixel


def ss2d(op: SS2D, x: Tensor, gate: str, scan: str) -> Tensor:
    """The paper's section 4.2 as written: one pixel after the other, in every direction."""
    weights = dict(op.named_parameters())
    batch, height, width, _ = x.shape
    x = x @ weights["in_proj.weight"].T
    z = None
    if gate != "none":
        x, z = x.chunk(2, -1)
    if "conv2d.weight" in weights:
        planes = x.permute(0, 3, 1, 2)
        planes = F.conv2d(
            planes, weights["conv2d.weight"], weights.get("conv2d.bias"), padding=1, groups=planes.shape[1]
        )
        x = planes.permute(0, 2, 3, 1)
    x = F.silu(x)
    d_inner, n = x.shape[-1], weights["A_logs"].shape[1]
    rows = [(i, j) for i in range(height) for j in range(width)]
    columns = [(i, j) for j in range(width) for i in range(height)]
    paths = {
        "cross": [rows, columns, rows[::-1], columns[::-1]],
        "bidirectional": [rows, rows, rows[::-1], rows[::-1]],
        "unidirectional": [rows] * 4,
    }[scan]
    y = torch.zeros_like(x)
    for k, path in enumerate(paths):
        mine = slice(k * d_inner, (k + 1) * d_inner)
        A, D = -weights["A_logs"][mine].exp(), weights["Ds"][mine]
        h = x.new_zeros(batch, d_inner, n)
        for i, j in path:
            u = x[:, i, j]
            low, B, C = (u @ weights["x_proj_weight"][k].T).split([op.widths[0], n, n], -1)
            dt = F.softplus(low @ weights["dt_projs_weight"][k].T + weights["dt_projs_bias"][k])
            h = torch.exp(dt[..., None] * A) * h + (dt * u)[..., None] * B[:, None]
            out = torch.zeros_like(y)
            out[:, i, j] = (h * C[:, None]).sum(-1) + D * u
            y = y + out
    y = F.layer_norm(y, (d_inner,), weights["out_norm.weight"], weights["out_norm.bias"])
    if z is not None:
        y = y * (F.silu(z) if gate == "silu" else z)
    return y @ weights["out_proj.weight"].T


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4, 1)], ids=str)
@variants
def test_ss2d_is_a_recurrence_over_pixels(variant: str, size: tuple[int, int]) -> None:
    model = build(**VARIANTS[variant]).double()
    op, config = model.layers[0].blocks[0].op, model.config
    x = images(2, *size, config.d_model[0], dtype=torch.float64).requires_grad_()
    weights = images(2, *size, config.d_model[0], dtype=torch.float64).flip(0)
    leaves = [x, *op.parameters()]
    y, expected = op(x), ss2d(op, x, config.gate, config.scan)
    torch.testing.assert_close(y, expected)
    ours, theirs = (torch.autograd.grad((out * weights).sum(), leaves) for out in (y, expected))
    torch.testing.assert_close(ours, theirs)


@variants
def test_float32_computes_what_float64_does(variant: str, backend: str) -> None:
    model, x = build(**VARIANTS[variant]), images(2, 3, 21, 34)
    expected = build(**VARIANTS[variant]).double()(x.double())
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-5)


def test_turning_an_image_over_swaps_the_directions() -> None:
    """The transposed image, with rows and columns exchanged in the weights, gives the transposed features."""
    model, turned = build().double(), build().double()
    for name, parameter in turned.named_parameters():
        if name.endswith(("x_proj_weight", "dt_projs_weight", "dt_projs_bias")):
            parameter.data = parameter.data[[1, 0, 3, 2]]
        elif name.endswith(("A_logs", "Ds")):
            parameter.data = parameter.data.unflatten(0, (4, -1))[[1, 0, 3, 2]].flatten(0, 1)
        elif parameter.dim() == 4:
            parameter.data = parameter.data.transpose(2, 3)
    x = images(2, 3, 19, 34, dtype=torch.float64)
    features = turned.forward_features(x.transpose(2, 3)).transpose(2, 3)
    torch.testing.assert_close(features, model.forward_features(x))
    assert (model.forward_features(x.transpose(2, 3)).transpose(2, 3) - features).abs().max() > 1e-3


def test_every_pixel_sees_every_other() -> None:
    op = build().double().layers[0].blocks[0].op
    x = images(1, 5, 6, 16, dtype=torch.float64).requires_grad_()
    for i, j in ((0, 0), (2, 3), (4, 5)):
        (dx,) = torch.autograd.grad(op(x)[0, i, j].sum(), x)
        assert (dx.abs().sum(-1) > 0).all()


# the models


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = VMamba(VMambaConfig.from_dict(PRESETS[name]))
    assert (model.num_parameters(), len(model.state_dict())) == PUBLISHED[name]


def test_the_published_names_and_shapes() -> None:
    with torch.device("meta"):
        shapes = {
            name: {key: tuple(tensor.shape) for key, tensor in VMamba(config).state_dict().items()}
            for name in ("vmamba_tiny_s1l8", "vanilla_vmamba_tiny")
            for config in [VMambaConfig.from_dict(PRESETS[name])]
        }
    second, first = shapes.values()
    for key, shape in {
        "patch_embed.0.weight": (48, 3, 3, 3),
        "patch_embed.5.weight": (96, 48, 3, 3),
        "patch_embed.7.bias": (96,),
        "layers.0.blocks.0.op.x_proj_weight": (4, 8, 96),
        "layers.0.blocks.0.op.A_logs": (384, 1),
        "layers.0.blocks.0.op.dt_projs_weight": (4, 96, 6),
        "layers.0.blocks.0.op.dt_projs_bias": (4, 96),
        "layers.0.blocks.0.op.conv2d.weight": (96, 1, 3, 3),
        "layers.2.blocks.7.op.x_proj_weight": (4, 26, 384),
        "layers.2.blocks.7.op.dt_projs_weight": (4, 384, 24),
        "layers.2.blocks.7.mlp.fc1.weight": (1536, 384),
        "layers.2.downsample.1.weight": (768, 384, 3, 3),
        "layers.2.downsample.3.weight": (768,),
        "classifier.norm.weight": (768,),
        "classifier.head.weight": (1000, 768),
    }.items():
        assert second[key] == shape, key
    for key, shape in {
        "patch_embed.0.weight": (96, 3, 4, 4),
        "patch_embed.2.weight": (96,),
        "layers.0.blocks.0.op.in_proj.weight": (384, 96),
        "layers.0.blocks.0.op.conv2d.bias": (192,),
        "layers.0.blocks.0.op.A_logs": (768, 16),
        "layers.0.downsample.reduction.weight": (192, 384),
        "layers.0.downsample.norm.weight": (384,),
    }.items():
        assert first[key] == shape, key
    assert not any("mlp" in key or "norm2" in key for key in first)


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (37, 53), (64, 96)], ids=str)
@variants
def test_any_size_of_image(variant: str, size: tuple[int, int]) -> None:
    model = build(**VARIANTS[variant])
    x = images(2, 3, *size)
    logits, maps = model(x), model.feature_maps(x)
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()
    assert [each.shape[1] for each in maps] == [16, 32]
    assert torch.equal(maps[-1], model.forward_features(x))
    assert (
        maps[-1].shape[2:] == tuple(-(-each // 2) for each in maps[0].shape[2:]) or variant == "linear-gate"
    )
    torch.testing.assert_close(model(x[:1]), logits[:1], rtol=1e-4, atol=1e-5)


@variants
def test_every_parameter_learns(variant: str) -> None:
    model = build(**VARIANTS[variant]).train()
    assert model.config == VMambaConfig.from_dict(model.config.to_dict())
    F.cross_entropy(model(images(2, 3, 33, 33)), torch.tensor([1, 7])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_a_seed_gives_the_same_model() -> None:
    config = VMambaConfig.from_dict(PRESETS["tiny"])
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second, other = (VMamba(config, generator=seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.fingerprint() == second.fingerprint() != other.fingerprint()
    assert all(parameter.isfinite().all() for parameter in first.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_recurrence_stays_float32(dtype: torch.dtype) -> None:
    exact, model = build(**VANILLA), build(**VANILLA).to(dtype)
    kinds = {name.split(".")[-1]: parameter.dtype for name, parameter in model.named_parameters()}
    assert {kinds.pop(name) for name in ("A_logs", "Ds", "dt_projs_bias")} == {torch.float32}
    assert set(kinds.values()) == {dtype}
    x = images(2, 3, 32, 32)
    logits = model(x.to(dtype))
    assert logits.dtype == dtype
    assert (logits.float() - exact(x)).abs().max() < 0.05 * exact(x).abs().max()
    exempt = {id(p) for p in model.no_decay_parameters()}
    assert len(exempt) == 3 * sum(model.config.n_blocks)
    decayed, plain = model.param_groups(0.1)
    assert exempt <= {id(p) for p in plain["params"]}
    assert all(p.dim() > 1 for p in decayed["params"])


def test_autocast() -> None:
    model, x = build(), images(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    assert (logits.float() - model(x)).abs().max() < 0.05 * model(x).abs().max()


def test_checkpointing_changes_nothing() -> None:
    results = []
    for checkpointing in (False, True):
        model = build().train()
        model.gradient_checkpointing = checkpointing
        model(images(2, 3, 24, 24)).square().sum().backward()
        results.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_drop_path_skips_branches_in_training_only() -> None:
    model, x = build(drop_path=0.5), images(8, 3, 16, 16)
    assert torch.equal(model(x), model(x))
    assert [block.drop_path.rate for stage in model.layers for block in stage.blocks] == [0, 0.25, 0.5]
    torch.manual_seed(0)
    block = model.layers[1].blocks[1].train()
    maps = images(64, 2, 2, 32)
    branch = block.eval()(maps) - maps
    assert (branch.abs().sum((1, 2, 3)) > 0).all()
    skipped = (block.train()(maps) == maps).flatten(1).all(1).float().mean()
    assert 0.1 < skipped < 0.45  # both of the two branches: a quarter


def test_another_head() -> None:
    model, x = build(), images(2, 3, 16, 16)
    features = model.forward_features(x)
    model.reset_classifier(3, ("a", "b", "c"), seeded(3))
    assert (model.config.n_classes, model.config.labels) == (3, ("a", "b", "c"))
    assert model(x).shape == (2, 3)
    assert torch.equal(model.forward_features(x), features)
    assert torch.equal(model.head_layer.bias, torch.zeros(3))


def test_the_norm_comes_before_the_mean() -> None:
    model, x = build(), images(2, 3, 32, 32)
    features = model.forward_features(x)
    pooled = model.classifier["norm"](features.permute(0, 2, 3, 1)).mean((1, 2))
    assert torch.equal(model(x), model.head_layer(pooled))
    assert (model.classifier["norm"](features.mean((2, 3))) - pooled).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_blocks": (1,)}, "for each stage"),
        ({"d_model": (16, 0)}, "for each stage"),
        ({"d_conv": 4}, "odd"),
        ({"d_model": (15, 32)}, "even"),
        ({"expand": 0.01}, "at least one channel"),
        ({"d_state": 0}, "d_state"),
        ({"gate": "tanh"}, "gate"),
        ({"labels": ["a"]}, "labels"),
    ],
)
def test_impossible_sizes_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(LongscanError, match=message):
        VMambaConfig.from_dict({**PRESETS["tiny"], **fields})


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (1, 3, 0, 8)], ids=str)
def test_what_is_no_image_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images: expected a non-empty \(batch, 3, height, width\)"):
        build()(torch.zeros(shape))
