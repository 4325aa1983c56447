"""VideoMamba: tokens of videos and images, positions of frames, the four scan orders, inflation, sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.errors import LongscanError
from longscan.models import VideoMamba, VideoMambaConfig
from longscan.models.videomamba import PRESETS, inflate
from longscan.models.vim import BACK, FORTH

PUBLISHED = {
    "videomamba_tiny": (7_148_008, 415),
    "videomamba_small": (25_796_584, 415),
    "videomamba_middle": (74_217_448, 551),
    "videomamba_base": (97_598_440, 415),
    "videomamba_tiny_f8": (7_033_744, 416),
    "videomamba_small_f16": (25_571_728, 416),
    "videomamba_middle_f16": (73_880_464, 552),
}
ORDERS = ("spatial", "temporal", "spatiotemporal_v1", "spatiotemporal_v2")
FRAMES, ROWS, COLUMNS = 5, 4, 3  # the grid of most videos here


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(**fields: Any) -> VideoMambaConfig:
    sizes = {"d_model": 12, "n_layers": 2, "patch_size": 4, "image_size": 16, "n_classes": 5, "d_state": 4}
    return VideoMambaConfig.from_dict({**sizes, "n_frames": 4, **fields})


def build(**fields: Any) -> VideoMamba:
    """Make a model in float64 whose parameters are all different."""
    model, generator = VideoMamba(small(**fields), seeded()).double(), seeded(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.eval()


def draw(*size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=seeded(2), dtype=torch.float64)


def norm(h: Tensor, weight: Tensor) -> Tensor:
    return h * (h.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def embedded(model: VideoMamba, video: Tensor) -> Tensor:
    """Return the patches (batch, FRAMES, ROWS, COLUMNS, d_model) with their positions, one by one."""
    kernel, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
    positions, _ = model.positions((FRAMES, ROWS, COLUMNS))
    tokens = torch.empty(len(video), FRAMES, ROWS, COLUMNS, 12, dtype=torch.float64)
    for t in range(FRAMES):
        for i in range(ROWS):
            for j in range(COLUMNS):
                patch = video[:, :, t, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
                mapped = torch.einsum("bcij,dcij->bd", patch, kernel[:, :, 0]) + bias
                tokens[:, t, i, j] = mapped + positions[0, :, t, i, j]
    return tokens


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = VideoMamba(VideoMambaConfig.from_dict(PRESETS[name]))
    assert (model.num_parameters(), len(model.state_dict())) == PUBLISHED[name]


def test_frame_by_frame_after_the_class_token() -> None:
    """The blocks add both directions, and the class token in front is classified."""
    model, video = build(), draw(FRAMES, 4 * ROWS, 4 * COLUMNS)
    patches = embedded(model, video).flatten(1, 3)
    h = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(2, 1, -1), patches], 1)
    for layer in model.layers:
        x = norm(h, layer.norm.weight)
        h = h + layer.mixer(x, [FORTH]) + layer.mixer(x, [BACK])
    h = norm(h, model.norm_f.weight)
    torch.testing.assert_close(model(video), F.linear(h[:, 0], model.head.weight, model.head.bias))
    maps = h[:, 1:].mT.reshape(2, 12, FRAMES, ROWS, COLUMNS)
    torch.testing.assert_close(model.feature_maps(video), [maps])


def test_temporal_first_is_spatial_first_of_the_turned_video() -> None:
    """Patch by patch through time: rows, columns and frames change their roles."""
    model, video = build(scan_order="temporal"), draw(FRAMES, 4 * ROWS, 4 * COLUMNS)
    patches = embedded(model, video).permute(0, 2, 3, 1, 4).flatten(1, 3)
    h = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(2, 1, -1), patches], 1)
    for layer in model.layers:
        h = h + layer.mixer(norm(h, layer.norm.weight))
    h = norm(h, model.norm_f.weight)
    torch.testing.assert_close(model.forward_features(video), h)
    maps = h[:, 1:].view(2, ROWS, COLUMNS, FRAMES, 12).permute(0, 4, 3, 1, 2)
    torch.testing.assert_close(model.feature_maps(video), [maps])


@pytest.mark.parametrize("version", [1, 2])
def test_spatiotemporal_orders_add_scans_of_both_kinds(version: int) -> None:
    model, video = build(scan_order=f"spatiotemporal_v{version}"), draw(FRAMES, 4 * ROWS, 4 * COLUMNS)
    patches = embedded(model, video).flatten(1, 3)
    h = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(2, 1, -1), patches], 1)

    def turned(tokens: Tensor, old: tuple[int, int, int], axes: tuple[int, int, int]) -> Tensor:
        moved = tokens[:, 1:].view(2, *old, 12).permute(0, *(axis + 1 for axis in axes), 4)
        return torch.cat([tokens[:, :1], moved.flatten(1, 3)], 1)

    for layer in model.layers:
        x = norm(h, layer.norm.weight)
        there = turned(x, (FRAMES, ROWS, COLUMNS), (1, 2, 0))
        scans = [layer.mixer(there, [BACK])] + ([layer.mixer(there, [FORTH])] if version == 2 else [])
        h = h + sum(turned(y, (ROWS, COLUMNS, FRAMES), (2, 0, 1)) for y in scans)
        h = h + layer.mixer(x, [FORTH] if version == 1 else [FORTH, BACK])
    torch.testing.assert_close(model.forward_features(video), norm(h, model.norm_f.weight))


@pytest.mark.parametrize("scan_order", ORDERS)
def test_one_frame_or_one_patch_makes_all_orders_equal(scan_order: str) -> None:
    """Only then do the spatial and the temporal order agree; version 2 scans twice and differs."""
    plain, model = build(), build(scan_order=scan_order)
    for size in ((1, 16, 12), (5, 4, 4)):
        same = torch.allclose(plain(draw(*size)), model(draw(*size)))
        assert same == (scan_order != "spatiotemporal_v2")
    assert torch.allclose(plain(draw(3, 8, 8)), model(draw(3, 8, 8))) == (scan_order == "spatial")


@pytest.mark.parametrize("scan_order", ORDERS)
@pytest.mark.parametrize("class_token", ["front", "middle", "double", "none"])
def test_any_size_and_number_of_frames(scan_order: str, class_token: str) -> None:
    model = build(scan_order=scan_order, class_token=class_token, tubelet=2)
    for frames, height, width in ((4, 16, 16), (2, 4, 4), (7, 9, 22), (64, 4, 5)):
        video = draw(frames, height, width, batch=1)
        (maps,) = model.feature_maps(video)
        assert maps.shape == (1, 12, frames // 2, height // 4, width // 4)
        assert model(video).shape == (1, 5)
    found = torch.autograd.grad(model(draw(6, 8, 8)).square().sum(), model.parameters())
    assert all(gradient.isfinite().all() for gradient in found)
    assert found[[name for name, _ in model.named_parameters()].index("temporal_pos_embedding")].any()


def test_positions_of_frames_are_resized_along_time() -> None:
    model = build(n_frames=4)
    with torch.no_grad():
        model.pos_embed.copy_(torch.arange(17.0).view(1, 17, 1).expand(1, 17, 12))
        model.temporal_pos_embedding.copy_(100 * torch.arange(4.0).view(1, 4, 1).expand(1, 4, 12))
    positions, its_own = model.positions((4, 4, 4))
    assert torch.equal(
        positions[0, 0], (100 * torch.arange(4.0)[:, None] + torch.arange(1.0, 17)).view(4, 4, 4).double()
    )
    assert torch.equal(its_own, model.pos_embed[:, :1])  # that of the first position, without a frame's
    longer, its_own = model.positions((8, 4, 4))
    ramp = torch.tensor([0, 25, 75, 125, 175, 225, 275, 300], dtype=torch.float64)  # linear, ends repeated
    torch.testing.assert_close(longer[0, 0], ramp.view(8, 1, 1) + positions[0, 0, :1])
    assert torch.equal(its_own, model.pos_embed[:, :1])


def test_an_image_model_has_no_time() -> None:
    model = build(n_frames=0)
    assert "temporal_pos_embedding" not in model.state_dict()
    assert model(draw(20, 17)).shape == (2, 5)
    assert model.feature_maps(draw(20, 17))[0].shape == (2, 12, 5, 4)
    with pytest.raises(ValueError, match=r"expected \(batch, 3, height, width\), got \(2, 3, 4, 16, 16\)"):
        model(draw(4, 16, 16))


def test_the_class_token_in_front_sees_the_video_through_the_backward_scan_only() -> None:
    model, video = build(n_layers=1), draw(2, 8, 8)
    with torch.no_grad():
        for name in ("D_b", "x_proj_b.weight"):  # with B = C = 0 and no skip the backward scan says nothing
            model.layers[0].mixer.get_parameter(name).zero_()
    torch.testing.assert_close(model(video), model(video + 1))
    assert not torch.allclose(model.forward_features(video), model.forward_features(video + 1))


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("tubelet", [1, 2, 3])
def test_an_inflated_model_sees_a_still_video_as_an_image(tubelet: int, mean: bool) -> None:
    """With one tubelet, whose frames are the same image, the video model starts as the image model."""
    image_model, image = build(n_frames=0, labels=tuple("abcde")), draw(16, 12)
    model = image_model.inflated(tubelet, tubelet, mean).eval()
    assert model.config == image_model.config.replace(n_frames=tubelet, tubelet=tubelet)
    assert model.dtype == torch.float64
    torch.testing.assert_close(model(image[:, :, None].repeat(1, 1, tubelet, 1, 1)), image_model(image))
    with pytest.raises(LongscanError, match="a video model already"):
        model.inflated(4)


def test_inflation_puts_a_patch_in_the_middle_or_shares_it() -> None:
    weight = torch.randn(6, 3, 4, 4, generator=seeded())
    middle, shared = inflate(weight, 4), inflate(weight, 4, mean=True)
    assert torch.equal(middle[:, :, 2], weight)
    assert not middle[:, :, [0, 1, 3]].any()
    torch.testing.assert_close(shared, (weight / 4)[:, :, None].expand(6, 3, 4, 4, 4))


def test_checkpointing_gives_the_same_gradients() -> None:
    model, video = build(drop_path=0.5, scan_order="spatiotemporal_v2").train(), draw(4, 8, 8)
    found = []
    for model.gradient_checkpointing in (False, True):
        torch.manual_seed(5)
        found.append(torch.autograd.grad(model(video).square().sum(), model.parameters()))
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain)


def test_weights_of_half_the_width_but_for_the_recurrence() -> None:
    model = VideoMamba(small(), seeded()).eval()
    expected = model(draw(4, 16, 16).float())
    model.bfloat16()
    wide = {name.rpartition("mixer.")[2] for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide == {"A_log", "D", "dt_proj.bias", "A_b_log", "D_b", "dt_proj_b.bias"}
    torch.testing.assert_close(model(draw(4, 16, 16)).float(), expected, rtol=0.05, atol=0.02)


def test_positions_are_not_decayed() -> None:
    model = VideoMamba(small(), seeded())
    decayed = {id(p) for p in model.param_groups(0.1)[0]["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert not {"pos_embed", "cls_token", "temporal_pos_embedding"} & names
    assert "patch_embed.proj.weight" in names


def test_it_learns_when_a_light_flashes() -> None:
    """Early or late: no frame alone shows it, nor does their mean."""
    model, generator = VideoMamba(small(drop_path=0.0, n_classes=2), seeded()), seeded(8)
    optimizer = torch.optim.AdamW(model.param_groups(0.01), lr=1e-2)
    for _ in range(80):
        truth = torch.randint(0, 2, (32,), generator=generator)
        within = torch.randint(0, 2, (32,), generator=generator)
        video = 0.3 * torch.randn(32, 3, 4, 4, 4, generator=generator)
        video[torch.arange(32), :, 2 * truth + within] += 1
        loss = F.cross_entropy(model(video), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 16, 16), r"expected \(batch, 3, n_frames, height, width\), got \(2, 3, 16, 16\)"),
        ((2, 3, 1, 16, 16), r"at least one patch, \(2, 4, 4\), got \(1, 16, 16\)"),
    ],
)
def test_videos_that_do_not_fit(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoMamba(small(tubelet=2))(torch.zeros(shape))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_frames": 2, "tubelet": 3}, "n_frames: expected at least one tubelet"),
        ({"n_frames": 0, "tubelet": 2}, "n_frames: expected frames"),
        ({"n_frames": 0, "scan_order": "temporal"}, "n_frames: expected frames"),
        ({"n_frames": -1}, "n_frames"),
        ({"scan_order": "spiral"}, "scan_order"),
        (
            {"scan_order": "spatiotemporal_v1", "bidirectional": "none", "class_token": "middle"},
            "bidirectional",
        ),
    ],
)
def test_sizes_that_are_impossible(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(LongscanError, match=message):
        small(**fields)
