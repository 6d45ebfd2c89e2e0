"""The feed-forward layer: SwiGLU (Shazeer, arXiv 2002.05202). Token-local."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .heads import Cut


class SwiGLU(nn.Module):
    """`down(silu(gate x) * up x)`, [T, D] -> [T, D]."""

    def __init__(self, hidden_size: int, ffn_width: int, initializer_range: float = 0.02) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * ffn_width, bias=False)
        self.down = nn.Linear(ffn_width, hidden_size, bias=False)
        self.initializer_range = initializer_range

    def reset_parameters(self) -> None:
        """N(0, initializer_range), as Llama."""
        for linear in (self.gate_up, self.down):
            nn.init.normal_(linear.weight, std=self.initializer_range)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)

    def cuts(self) -> dict[str, Cut]:
        width = self.down.in_features
        return {"gate_up.weight": Cut(0, ((width, 1), (width, 1))), "down.weight": Cut(1, ((width, 1),))}

    def keep_heads(self, part: int, parts: int) -> None:
        """Nothing to note: widths are the weights'."""

    def flops_per_token(self) -> int:
        """Forward FLOPs of one token."""
        return 2 * (self.gate_up.weight.numel() + self.down.weight.numel())
