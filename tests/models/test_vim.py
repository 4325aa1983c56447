"""Vision Mamba: the two directions of a block, class tokens, positions of any grid, drop path, sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.errors import LongscanError
from longscan.models import Vim, VimConfig
from longscan.models.common.patch_tokens import join, separate
from longscan.models.mamba import MambaMixer
from longscan.models.vim import BACK, FORTH, PRESETS, Route, VimMixer

PUBLISHED = {
    "vim_tiny": 7_148_008,
    "vim_tiny_stride8": 7_250_344,
    "vim_small": 25_796_584,
    "vim_small_stride8": 26_001_256,
    "vim_base": 97_598_440,
}
TOKENS = ("middle", "front", "double", "none")
LENGTHS = (1, 2, 3, 7, 12)  # shorter than the convolution, odd, even


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(**fields: Any) -> VimConfig:
    sizes = {"d_model": 12, "n_layers": 3, "patch_size": 4, "image_size": 16, "n_classes": 5, "d_state": 4}
    return VimConfig.from_dict({**sizes, **fields})


def build(**fields: Any) -> Vim:
    """Make a model in float64 whose parameters are all different."""
    model, generator = Vim(small(**fields), seeded()).double(), seeded(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def images(*size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=seeded(2), dtype=torch.float64)


def gradients(model: torch.nn.Module, output: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (output * torch.arange(1.0, output.numel() + 1).view_as(output).sin()).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-11, msg=name)


def direction(parts: dict[str, Tensor], x: Tensor, z: Tensor, end: str) -> Tensor:
    """Return what one direction computes for one sequence, token by token; x, z: (seq_len, d_inner)."""
    A = -parts["A_b_log" if end else "A_log"].exp()
    kernel, width = parts[f"conv1d{end}.weight"][:, 0], parts[f"conv1d{end}.weight"].shape[2]
    rank = parts[f"dt_proj{end}.weight"].shape[1]
    h, ys = torch.zeros_like(A), []
    for t in range(len(x)):
        u = parts[f"conv1d{end}.bias"]
        for lag in range(min(width, t + 1)):
            u = u + kernel[:, width - 1 - lag] * x[t - lag]
        u = F.silu(u)
        dt, B, C = (parts[f"x_proj{end}.weight"] @ u).split([rank, A.shape[1], A.shape[1]])
        dt = F.softplus(parts[f"dt_proj{end}.weight"] @ dt + parts[f"dt_proj{end}.bias"])
        h = torch.exp(dt[:, None] * A) * h + dt[:, None] * B * u[:, None]
        ys.append((h @ C + parts[f"D{end}"] * u) * F.silu(z[t]))
    return torch.stack(ys)


def literal(mixer: VimMixer, x: Tensor) -> Tensor:
    """Return the output of the paper's block (algorithm 1): the gate in each direction, the mean of both."""
    parts, rows = dict(mixer.named_parameters()), []
    for row in x:
        a, z = (row @ parts["in_proj.weight"].T).chunk(2, -1)
        back = direction(parts, a.flip(0), z.flip(0), "_b").flip(0)
        rows.append((direction(parts, a, z, "") + back) / 2 @ parts["out_proj.weight"].T)
    return torch.stack(rows)


@pytest.mark.parametrize("seq_len", LENGTHS)
def test_a_block_is_the_papers_recurrence_in_both_directions(seq_len: int) -> None:
    mixer = build().layers[1].mixer
    x = torch.randn(2, seq_len, 12, generator=seeded(3), dtype=torch.float64)
    torch.testing.assert_close(mixer(x), literal(mixer, x), rtol=1e-10, atol=1e-12)
    assert_same(gradients(mixer, mixer(x)), gradients(mixer, literal(mixer, x)))


def test_the_kernels_compute_the_same(backend: str) -> None:
    mixer = build().layers[1].mixer
    x = torch.randn(2, 13, 12, generator=seeded(3), dtype=torch.float64)
    expected, mixer = literal(mixer, x), mixer.float()
    torch.testing.assert_close(mixer(x.float()).double(), expected, rtol=1e-4, atol=1e-5)


def test_one_direction_is_mamba() -> None:
    config = small(bidirectional="none")
    mixer, mamba = VimMixer(config, seeded()), MambaMixer(config.mixer, seeded())
    x = torch.randn(2, 9, 12, generator=seeded(3))
    torch.testing.assert_close(mixer(x, [FORTH]), mamba(x)[0])


def test_the_first_version_shares_all_but_A() -> None:
    """Both directions scan what one convolution, which runs forwards, has made of the tokens."""
    shared, mixer = small(bidirectional="v1"), VimMixer(small(bidirectional="none"), seeded()).double()
    both = VimMixer(shared, seeded()).double()
    assert {name for name, _ in both.named_parameters()} - {name for name, _ in mixer.named_parameters()} == {
        "A_b_log"
    }
    x = torch.randn(1, 8, 12, generator=seeded(3), dtype=torch.float64)
    with torch.no_grad():
        both.conv1d.weight[..., :-1] = 0  # of the current token alone: all of both directions is symmetric
        torch.testing.assert_close(both(x.flip(1)).flip(1), both(x))
        both.conv1d.weight[..., -1], both.conv1d.weight[..., -2] = 0, 1
        assert not torch.allclose(both(x.flip(1)).flip(1), both(x))


def test_swapping_the_directions_mirrors_a_block() -> None:
    mixer = build().layers[0].mixer
    swapped = {}
    for name, parameter in mixer.state_dict().items():
        other = {"A_log": "A_b_log", "A_b_log": "A_log", "D": "D_b", "D_b": "D"}.get(name, name)
        for part in ("conv1d", "x_proj", "dt_proj"):
            other = other.replace(f"{part}.", f"{part}@").replace(f"{part}_b.", f"{part}.")
            other = other.replace(f"{part}@", f"{part}_b.")
        swapped[other] = parameter
    mirror = build().layers[0].mixer
    mirror.load_state_dict(swapped)
    x = torch.randn(2, 9, 12, generator=seeded(3), dtype=torch.float64)
    torch.testing.assert_close(mirror(x.flip(1)).flip(1), mixer(x))


def test_a_route_scans_the_tokens_in_its_order() -> None:
    mixer = build(halve=False).layers[0].mixer
    x = torch.randn(2, 9, 12, generator=seeded(3), dtype=torch.float64)
    order = torch.randperm(9, generator=seeded(4))
    expected = torch.empty_like(x)
    expected[:, order] = mixer(x[:, order], [BACK])
    torch.testing.assert_close(mixer(x, [Route(True, order)]), expected)
    torch.testing.assert_close(mixer(x, [FORTH, Route(True, order)]), mixer(x, [FORTH]) + expected)


def test_halving_and_the_scale_of_a_layer() -> None:
    x = torch.randn(2, 5, 12, generator=seeded(3))
    mean, total = (VimMixer(small(halve=halve), seeded())(x) for halve in (True, False))
    torch.testing.assert_close(total, 2 * mean)
    scaled = VimMixer(small(layer_scale=0.25), seeded())
    assert scaled.gamma is not None
    assert scaled.gamma.shape == (12,)
    torch.testing.assert_close(scaled(x), mean / 4)


# the model


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = Vim(VimConfig.from_dict(PRESETS[name]))
    assert model.num_parameters() == PUBLISHED[name]
    assert len(model.state_dict()) == 415
    assert model.pos_embed.shape[1] == (730 if "stride8" in name else 197)


def test_a_model_is_residual_blocks_around_a_class_token_in_the_middle() -> None:
    model, x = build(), images(16, 20)
    tokens = F.conv2d(x, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=4)
    positions, its_own = model.positions((4, 5))
    tokens = (tokens + positions).flatten(2).mT  # (batch, 20, d_model)
    h = torch.cat([tokens[:, :10], (model.cls_token + its_own).expand(2, 1, -1), tokens[:, 10:]], 1)
    for layer in model.layers:
        h = h + literal(layer.mixer, h * (h.square().mean(-1, True) + 1e-5).rsqrt() * layer.norm.weight)
    h = h * (h.square().mean(-1, True) + 1e-5).rsqrt() * model.norm_f.weight
    torch.testing.assert_close(model.eval()(x), F.linear(h[:, 10], model.head.weight, model.head.bias))
    maps = h[:, [*range(10), *range(11, 21)]].mT.reshape(2, 12, 4, 5)
    torch.testing.assert_close(model.feature_maps(x), [maps])


@pytest.mark.parametrize("class_token", TOKENS)
@pytest.mark.parametrize("size", [(16, 16), (4, 4), (5, 7), (23, 37), (4, 40)], ids=str)
def test_any_size_gives_tokens_maps_and_logits(class_token: str, size: tuple[int, int]) -> None:
    model, x = build(class_token=class_token, stride=3).eval(), images(*size)
    height, width = ((pixels - 4) // 3 + 1 for pixels in size)
    features = model.forward_features(x)
    n_classes = {"double": 2, "none": 0}.get(class_token, 1)
    assert features.shape == (2, height * width + n_classes, 12)
    assert [maps.shape for maps in model.feature_maps(x)] == [(2, 12, height, width)]
    torch.testing.assert_close(model(x), model.head(model.pool(features)))
    assert model(x).shape == (2, 5)


@pytest.mark.parametrize("class_token", TOKENS)
@pytest.mark.parametrize("n_patches", [1, 2, 5, 6])
def test_class_tokens_stand_where_they_should(class_token: Any, n_patches: int) -> None:
    patches = torch.arange(1.0, n_patches + 1).view(1, -1, 1)
    classes = -torch.arange(1.0, {"double": 2, "none": 0}.get(class_token, 1) + 1).view(1, -1, 1)
    tokens = join(patches, classes, class_token)
    where = {"middle": [n_patches // 2], "front": [0], "double": [0, n_patches + 1], "none": []}[class_token]
    assert (tokens < 0).flatten().nonzero().flatten().tolist() == where
    for ours, theirs in zip(separate(tokens, class_token), (patches, classes), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("class_token", TOKENS)
def test_positions_of_the_training_grid_are_those_learned(class_token: Any) -> None:
    model = build(class_token=class_token)
    maps, classes = model.positions((4, 4))
    assert torch.equal(join(maps.flatten(2).mT, classes, class_token), model.pos_embed)


@pytest.mark.parametrize("grid", [(8, 8), (3, 7), (1, 1)], ids=str)
def test_positions_of_other_grids_are_resized_without_the_class_token(grid: tuple[int, int]) -> None:
    model = build()
    across, down = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="xy")
    learned = torch.zeros(1, 12, 4, 4, dtype=torch.float64)
    learned[0, 0], learned[0, 1], learned[0, 2] = across, down, 3
    with torch.no_grad():
        model.pos_embed.copy_(join(learned.flatten(2).mT, torch.full((1, 1, 12), 100.0).double(), "middle"))
    maps, classes = model.positions(grid)
    assert maps.shape == (1, 12, *grid)
    assert (classes == 100).all()
    assert maps.abs().max() < 4  # nothing of the class token
    torch.testing.assert_close(maps[0, 2], torch.full(grid, 3.0, dtype=torch.float64))
    assert (maps[0, 0].diff(dim=1) > 0).all()
    assert (maps[0, 1].diff(dim=0) > 0).all()
    torch.testing.assert_close(maps[0, 0], maps[0, 0, :1].expand(grid))
    torch.testing.assert_close(maps[0, :2].mean((1, 2)), torch.full((2,), 1.5, dtype=torch.float64))


def test_drop_path_skips_the_same_branches_as_the_paper() -> None:
    """There each block drops the output of the one before it, the last norm that of the last."""
    model, x = build(drop_path=0.6, n_layers=4).train(), images(16, 16, batch=6)

    def late(rate: float, hidden: Tensor) -> Tensor:
        return hidden * (torch.rand(6, 1, 1) >= rate) / (1 - rate) if rate else hidden

    positions, its_own = model.positions((4, 4))
    patches = (model.patch_embed(x) + positions).flatten(2).mT
    hidden = join(patches, (model.cls_token + its_own).expand(6, -1, -1), "middle")
    residual, rates = torch.zeros_like(hidden), [0, 0, 0.2, 0.4, 0.6]
    torch.manual_seed(5)
    for layer, rate in zip(model.layers, rates, strict=False):
        residual = residual + late(rate, hidden)
        hidden = layer.mixer(layer.norm(residual))
    expected = model.norm_f(residual + late(rates[-1], hidden))
    torch.manual_seed(5)
    torch.testing.assert_close(model.forward_features(x), expected)
    assert not torch.allclose(model.forward_features(x), expected)
    assert torch.equal(model.eval()(x), model(x))


def test_checkpointing_gives_the_same_gradients() -> None:
    model, x = build(drop_path=0.5).train(), images(16, 16)
    torch.manual_seed(5)
    plain = gradients(model, model(x))
    model.gradient_checkpointing = True
    torch.manual_seed(5)
    assert_same(gradients(model, model(x)), plain)


@pytest.mark.parametrize(
    ("class_token", "bidirectional"),
    [
        (token, kind)
        for token in TOKENS
        for kind in ("v2", "v1", "none")
        if (token, kind) != ("front", "none")
    ],
)
def test_every_parameter_gets_a_gradient(class_token: str, bidirectional: str) -> None:
    model = build(class_token=class_token, bidirectional=bidirectional, layer_scale=0.5)
    found = gradients(model, model(images(20, 12)))
    assert found.keys() == {name for name, _ in model.named_parameters()}
    idle = {name for name, gradient in found.items() if not gradient.any()}
    # nothing stands before a token in front that its last forward scan could forget
    assert idle == ({"layers.2.mixer.A_log"} if class_token == "front" else set())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_recurrence_stays_float32(dtype: torch.dtype) -> None:
    model = Vim(small(), seeded()).eval()
    x = images(16, 16).float()
    expected = model(x)
    model.to(dtype)
    wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    names = ("A_log", "D", "dt_proj.bias", "A_b_log", "D_b", "dt_proj_b.bias")
    assert wide == {f"layers.{i}.mixer.{name}" for i in range(3) for name in names}
    assert model(x).dtype == dtype
    torch.testing.assert_close(model(x).float(), expected, rtol=0.05, atol=0.02)


def test_weight_decay_is_for_matrices_only() -> None:
    model = Vim(small(), seeded())
    decayed = {id(p) for p in model.param_groups(0.1)[0]["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert not any(name.endswith(("A_log", "A_b_log")) for name in names)
    assert not {"pos_embed", "cls_token"} & names
    assert {"patch_embed.proj.weight", "head.weight", "layers.0.mixer.in_proj.weight"} <= names


def test_time_steps_of_both_directions_start_in_their_range() -> None:
    mixer = Vim(small(), seeded()).layers[0].mixer
    for bias in (mixer.dt_proj.bias, mixer.dt_proj_b.bias):
        dt = F.softplus(bias)
        assert ((dt > 9e-4) & (dt < 0.11)).all()


def test_a_new_head_leaves_the_rest() -> None:
    model = Vim(small(), seeded())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.reset_classifier(2, ("cat", "dog"), seeded(7))
    assert (model.config.n_classes, model.config.labels) == (2, ("cat", "dog"))
    after = model.state_dict()
    assert model.eval()(images(16, 16).float()).shape == (2, 2)
    assert all(torch.equal(after[name], before[name]) for name in before if not name.startswith("head."))
    with pytest.raises(LongscanError, match="labels: expected 3 names"):
        model.reset_classifier(3, ("cat", "dog"))


def test_the_seed_decides_the_weights() -> None:
    one, same, other = (Vim(small(), seeded(seed)).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["pos_embed"], other["pos_embed"])


def test_it_learns_where_a_light_is() -> None:
    model, generator = Vim(small(drop_path=0.0), seeded()), seeded(8)
    optimizer = torch.optim.AdamW(model.param_groups(0.01), lr=5e-3)
    for _ in range(60):
        truth = torch.randint(0, 4, (32,), generator=generator)
        x = 0.3 * torch.randn(32, 3, 16, 16, generator=generator)
        for image, corner in zip(x, truth.tolist(), strict=True):
            top, left = 8 * (corner // 2), 8 * (corner % 2)
            image[:, top : top + 8, left : left + 8] += 1
        loss = F.cross_entropy(model(x), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 16), r"expected \(batch, 3, height, width\), got \(2, 3, 16\)"),
        ((2, 1, 16, 16), r"expected \(batch, 3, height, width\), got \(2, 1, 16, 16\)"),
        ((2, 3, 3, 16), r"height, width of at least one patch, \(4, 4\), got \(3, 16\)"),
    ],
)
def test_images_that_do_not_fit(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Vim(small())(torch.zeros(shape))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 17}, "image_size: expected at least one patch"),
        ({"stride": 0}, "stride"),
        ({"d_state": 0}, "d_state"),
        ({"n_layers": 0}, "n_layers"),
        ({"class_token": "last"}, "class_token"),
        ({"class_token": "front", "bidirectional": "none"}, "class_token: expected 'middle'"),
        ({"drop_path": 1.0}, "drop_path"),
    ],
)
def test_sizes_that_are_impossible(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(LongscanError, match=message):
        small(**fields)


@pytest.mark.parametrize("class_token", TOKENS)
def test_a_resized_model_stores_the_positions_that_it_interpolated(class_token: str) -> None:
    model, pictures = build(class_token=class_token).eval(), images(24, 24)
    expected = model(pictures)
    model.resize(24)
    assert (model.config.image_size, model.config.grid) == (24, 6)
    torch.testing.assert_close(model(pictures), expected, rtol=1e-12, atol=1e-12)
    again = Vim(model.config, seeded()).double().eval()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(pictures), expected, rtol=1e-12, atol=1e-12)
