"""A mixture of experts: a router picks a few of many feed-forward layers for each token.

    y = sum_e w_e f_e(x) + f_shared(x)      over the k experts with the largest scores

Three routers, which differ in the weights w:

    topk-softmax   the softmax of the k largest scores (Mixtral, Granite)
    softmax-topk   the k largest of the softmax over all scores, which sum to less than 1 (Jamba)
    sigmoid        the sigmoids of the scores; a correction that is learned apart from the loss is added for
                   the choice only, which may be limited to the best groups of experts (DeepSeek-V3, Nemotron)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Literal, Self, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan import ops
from longscan.errors import LongscanError
from longscan.models.common.feed_forward import FeedForward, FeedForwardKind, feed_forward
from longscan.models.common.layers import normal_linear
from longscan.models.common.native_decode import matrix, plain

__all__ = ["Experts", "ExpertsLayer", "Router", "RouterKind"]

RouterKind: TypeAlias = Literal["topk-softmax", "softmax-topk", "sigmoid"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsLayer:
    """The sizes and options of one mixture.

    Attributes:
        d_model: width of the residual stream.
        n_experts: feed-forward layers to choose from.
        n_active: of those, for each token.
        d_ff: width inside an expert.
        d_shared: width inside the layer that all tokens pass through; 0: there is none.
        d_latent: width of what the experts map, between two projections; 0: they map d_model.
        kind: of the feed-forward layers.
        router: how weights follow from scores.
        n_groups: of adjacent experts; only of a "sigmoid" router, as what follows.
        n_active_groups: the experts of a token are in so many groups.
        normalize: whether the weights of a token are divided by their sum.
        scale: constant factor of the weights.
        depth: terms that add up in the residual stream, for the initialisation.
    """

    d_model: int
    n_experts: int
    n_active: int
    d_ff: int
    d_shared: int = 0
    d_latent: int = 0
    kind: FeedForwardKind = "swiglu"
    router: RouterKind = "topk-softmax"
    n_groups: int = 1
    n_active_groups: int = 1
    normalize: bool = True
    scale: float = 1.0
    depth: int = 1

    def __post_init__(self) -> None:
        """Check that there are as many experts and groups as a token needs.

        Raises:
            LongscanError: there are not.
        """
        if self.n_active > self.n_experts:
            raise LongscanError(
                f"n_active_experts: expected at most {self.n_experts} experts, got {self.n_active}."
            )
        if self.n_experts % self.n_groups or (self.n_groups > 1 and self.n_experts < 2 * self.n_groups):
            raise LongscanError(
                f"n_expert_groups: expected a divisor of {self.n_experts} experts with two or more to a "
                f"group, got {self.n_groups}."
            )
        if not self.n_active <= self.n_active_groups * (self.n_experts // self.n_groups) <= self.n_experts:
            raise LongscanError(
                f"n_active_groups: expected at most {self.n_groups} groups, which hold {self.n_active} "
                f"experts or more, got {self.n_active_groups}."
            )


class Router(nn.Module):
    """Chooses the experts of each token; computed in float32 at least.

    Args:
        layer: sizes and options.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    correction: Tensor | None

    def __init__(self, layer: ExpertsLayer, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.weight = nn.Parameter(torch.empty(layer.n_experts, layer.d_model))
        corrected = layer.router == "sigmoid"  # by whoever balances the load: it has no gradient
        self.register_buffer("correction", torch.zeros(layer.n_experts) if corrected else None)
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=0.02, generator=generator)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights and the experts of tokens.

        Args:
            x: (n, d_model).

        Returns:
            weights: (n, n_active), at least float32.
            experts: (n, n_active) int64.
        """
        layer, dtype = self.layer, torch.promote_types(self.weight.dtype, torch.float32)
        scores = F.linear(x.to(dtype), self.weight.to(dtype))  # (n, n_experts)
        if layer.router == "topk-softmax":
            chosen, experts = scores.topk(layer.n_active)
            return chosen.softmax(-1), experts
        if layer.router == "softmax-topk":
            weights, experts = scores.softmax(-1).topk(layer.n_active)
            return weights, experts
        assert self.correction is not None
        scores = scores.sigmoid()
        experts = self._within_groups(scores + self.correction).topk(layer.n_active).indices
        weights = scores.gather(1, experts)
        if layer.normalize:
            weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
        return weights * layer.scale, experts

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the module; under `.bfloat16()` and `.half()` the correction stays float32."""
        before = self.correction
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if before is not None and self.correction is not None and self.correction.itemsize < 4:
            self.correction = before.to(self.correction.device, torch.float32)
        return self

    def _within_groups(self, scores: Tensor) -> Tensor:
        """Return scores (n, n_experts), -infinity outside the groups whose two best experts are best."""
        n_groups, n_active = self.layer.n_groups, self.layer.n_active_groups
        if n_active == n_groups:
            return scores
        groups = scores.view(len(scores), n_groups, -1)  # (n, n_groups, experts of each)
        best = groups.topk(2).values.sum(-1).topk(n_active).indices
        outside = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(1, best, False)
        inside: Tensor = groups.masked_fill(outside[..., None], -torch.inf)
        return inside.flatten(1)


class Experts(FeedForward):
    """The mixture; each expert maps all of its tokens at once.

    Args:
        layer: sizes and options.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    def __init__(self, layer: ExpertsLayer, generator: torch.Generator | None = None) -> None:
        super().__init__()
        d_model, width, depth = layer.d_model, layer.d_latent or layer.d_model, layer.depth
        self.router = Router(layer, generator)
        self.experts = nn.ModuleList(
            feed_forward(layer.kind, width, layer.d_ff, generator, depth=depth)
            for _ in range(layer.n_experts)
        )
        self.shared = self.fc1_latent_proj = self.fc2_latent_proj = None
        if layer.d_shared:
            self.shared = feed_forward(layer.kind, d_model, layer.d_shared, generator, depth=depth)
        if layer.d_latent:
            self.fc1_latent_proj = normal_linear(d_model, width, generator)
            self.fc2_latent_proj = normal_linear(width, d_model, generator, depth=depth)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_model) to (..., d_model)."""
        flat = x.reshape(-1, x.shape[-1])  # (n, d_model)
        weights, chosen = self.router(flat)
        narrow = flat if self.fc1_latent_proj is None else self.fc1_latent_proj(flat)
        y = self._mix(narrow, weights, chosen)
        if self.fc2_latent_proj is not None:
            y = self.fc2_latent_proj(y)
        if self.shared is not None:
            y = y + self.shared(flat)
        return y.view_as(x)

    def native(self, layer: int, norm: Tensor | None) -> list[ops.Sublayer] | None:
        """Return mixture and shared layer, of the same input, for the native decoder; see `Mixer.native`.

        Of equal scores it chooses the first experts, where torch may choose any.
        """
        sizes, router = self.router.layer, self.router
        experts, shared = _mlps(self.experts, layer), _mlps([self.shared] if self.shared else [], layer)
        if experts is None or shared is None or not plain(router.weight, router.correction):
            return None
        latent = None
        if self.fc1_latent_proj is not None and self.fc2_latent_proj is not None:
            both = matrix(self.fc1_latent_proj), matrix(self.fc2_latent_proj)
            if both[0] is None or both[1] is None:
                return None
            latent = both[0], both[1]
        chooses = ops.Router(
            router.weight,
            router.correction,
            sizes.router,
            sizes.n_active,
            n_groups=sizes.n_groups,
            n_active_groups=sizes.n_active_groups,
            normalize=sizes.normalize,
            scale=sizes.scale,
        )
        weights = ops.ExpertsWeights(chooses, tuple(experts), latent)
        return [ops.Sublayer(weights, layer, norm), *(ops.Sublayer(mlp, layer, None) for mlp in shared)]

    def _mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Return the weighted sum over the chosen experts (n, n_active) of tokens x (n, width)."""
        order = chosen.flatten().argsort(stable=True)  # pairs of token and expert, grouped by expert
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        pieces = torch.split(x[order // chosen.shape[1]], counts)
        every = torch.is_grad_enabled()  # the gradients of experts without tokens are zero, not None
        mapped = [
            expert(piece) for expert, piece in zip(self.experts, pieces, strict=True) if every or len(piece)
        ]
        pairs = torch.cat(mapped)[order.argsort()].view(*chosen.shape, -1)  # (n, n_active, width)
        return (pairs * weights.to(pairs.dtype)[..., None]).sum(1)


def _mlps(layers: Iterable[nn.Module], layer: int) -> list[ops.MLPWeights] | None:
    """Return the weights of feed-forward layers for the native decoder; None if one has others or factors."""
    weights = []
    for module in layers:
        found = module.native(layer, None) if isinstance(module, FeedForward) else None
        if found is None or len(found) != 1 or found[0].out_scale != 1:
            return None
        [sublayer] = found
        if not isinstance(sublayer.weights, ops.MLPWeights):
            return None
        weights.append(sublayer.weights)
    return weights
