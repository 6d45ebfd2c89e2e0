"""The oracle: token by token, differentiable by autograd. Legend: T tokens, N parts, D channels, W taps."""

from __future__ import annotations

import torch
from torch import Tensor

from longhaul.models.ops.segments import Segments


def naive_causal_conv(
    x: Tensor,
    context: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    segments: Segments,
    activation: str | None = None,
) -> Tensor:
    """`causal_conv` from its definition: x [T, D], context [N, W - 1, D], weight [D, W], bias [D] -> y [T, D]."""
    taps = weight.shape[1]
    positions = segments.positions().tolist()
    rows = []
    for part, (start, stop) in enumerate(zip(segments.part_bounds, segments.part_bounds[1:])):
        for token in range(start, stop):
            y = torch.zeros_like(x[token]) if bias is None else bias
            for back in range(min(taps, positions[token] + 1)):
                source = token - back
                value = x[source] if source >= start else context[part, taps - 1 + source - start]
                y = y + weight[:, taps - 1 - back] * value
            rows.append(torch.nn.functional.silu(y) if activation == "silu" else y)
    return torch.stack(rows) if rows else x + 0 * (context.sum() + weight.sum())
