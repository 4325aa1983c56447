"""A scan over an image is a product with its hidden attention, plus a skip connection."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.errors import LongscanError, UsageError
from longscan.inference.hidden_attention import LayerScans, attention_rows, layer_scans, scan_layers
from longscan.models import MODELS
from longscan.models.common.vision import VisionConfig, VisionModel
from longscan.models.vmamba import SS2D


def make(name: str, dtype: torch.dtype = torch.float64, **fields: Any) -> Any:
    entry = MODELS[name]
    config = entry.config.from_dict({**entry.presets["tiny"], **fields})
    return entry.cls(config, generator=torch.Generator().manual_seed(0)).eval().to(dtype)


def picture(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(1, 3, 20, 28, generator=torch.Generator().manual_seed(1)).to(dtype)


def sums(scans: LayerScans) -> Tensor:
    """sum_j alpha_ij u_j + D u_i over all paths, (n, d_inner)."""
    u = scans.by_position(scans.u)
    alpha = attention_rows(scans, range(u.shape[1]))
    return torch.einsum("kidj,kjd->id", alpha, u) + (scans.D[:, None] * u).sum(0)


def run(model: VisionModel, image: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Input and output of a layer."""
    seen: list[tuple[Tensor, Tensor]] = []
    mixer = scan_layers(model)[layer]
    hook = mixer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        model(image)
    hook.remove()
    return seen[0]


def finish(mixer: Any, x: Tensor, y: Tensor) -> Tensor:
    """What a layer makes of the sum of its scans y: norm, gate and projection."""
    halves = mixer.in_proj(x).chunk(2, dim=-1)
    if isinstance(mixer, SS2D):
        y = mixer.out_norm(y).view(*x.shape[:3], -1)
        return mixer.out_proj(y if mixer.gate == "none" else y * F.silu(halves[1]))
    return mixer.out_proj((y / 2 if mixer.halve else y) * F.silu(halves[1]))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("vmamba", {}),
        ("vmamba", {"d_state": 4, "expand": 2.0, "gate": "silu", "mlp_ratio": 0.0}),
        ("vmamba", {"scan": "bidirectional"}),
        ("vim", {}),
        ("vim", {"bidirectional": "v1", "class_token": "double"}),
        ("vim", {"bidirectional": "none", "class_token": "none"}),
        ("videomamba", {"n_frames": 0}),
    ],
)
@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_attention_is_the_layer(
    name: str, fields: dict[str, Any], layer: int, dtype: torch.dtype, atol: float
) -> None:
    model, image = make(name, dtype, **fields), picture(dtype)
    scans = layer_scans(model, image, layer)
    y = sums(scans)
    torch.testing.assert_close(y, scans.y, atol=atol, rtol=0)
    x, output = run(model, image, layer)
    with torch.no_grad():
        torch.testing.assert_close(
            finish(scan_layers(model)[layer], x, y).view_as(output), output, atol=atol, rtol=0
        )


def test_a_path_attends_to_what_came_before() -> None:
    scans = layer_scans(make("vmamba"), picture(), 0)
    rows, columns = scans.grid
    assert (rows, columns) == (5, 7)
    row, column = 2, 3
    alpha = attention_rows(scans, [scans.position(row, column)])[:, 0]
    attended = scans.maps(alpha.abs().sum(1)) > 0  # (n_paths, rows, columns)
    i, j = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    before = (i < row) | ((i == row) & (j <= column))
    left = (j < column) | ((j == column) & (i <= row))
    after = (i > row) | ((i == row) & (j >= column))
    right = (j > column) | ((j == column) & (i >= row))
    for path, expected in zip(attended, (before, left, after, right), strict=True):
        assert torch.equal(path, expected)
    assert attended.any(0).all()  # together they see everything


def test_class_tokens_are_no_patches() -> None:
    scans = layer_scans(make("vim"), picture(), 0)
    assert (scans.grid, scans.classes, scans.order.shape) == ((5, 7), (17,), (2, 36))
    assert [scans.position(0, 0), scans.position(2, 2), scans.position(2, 3)] == [0, 16, 18]
    numbers = torch.arange(36)
    assert scans.maps(numbers).flatten().tolist() == [*range(17), *range(18, 36)]
    forth, back = attention_rows(scans, scans.classes)[:, 0].abs().sum(1)
    assert [bool(each.any()) for each in (forth[:17], forth[18:], back[:17], back[18:])] == [
        *(True, False, False, True)
    ]


def test_time_steps_are_after_the_softplus() -> None:
    model = make("vmamba")
    mixer = scan_layers(model)[0]
    with torch.no_grad():
        mixer.dt_projs_weight.zero_()
    scans = layer_scans(model, picture(), 0)
    expected = F.softplus(mixer.dt_projs_bias)[:, None].expand_as(scans.dt)
    torch.testing.assert_close(scans.dt, expected)


def test_there_is_no_such_layer() -> None:
    model = make("vim")
    with pytest.raises(UsageError, match="layer: expected 0 to 1, got 2"):
        layer_scans(model, picture(), 2)
    assert torch.equal(layer_scans(model, picture(), -1).u, layer_scans(model, picture(), 1).u)


class Convolution(VisionModel):
    """A model without a scan."""

    def __init__(self) -> None:
        super().__init__(VisionConfig(n_classes=2))
        self.d_features, self.stem, self.head = 4, nn.Conv2d(3, 4, 4), nn.Linear(4, 2)

    def forward_features(self, images: Tensor) -> Tensor:
        return self.stem(images)

    def pool(self, features: Tensor) -> Tensor:
        return features.mean((2, 3))

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        return [self.stem(images)]


def test_a_model_without_scans_has_none() -> None:
    with pytest.raises(LongscanError, match="such as vmamba or vim; got Convolution"):
        layer_scans(Convolution(), picture(torch.float32))
