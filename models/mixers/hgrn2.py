"""HGRN2: a gated linear RNN whose state is expanded by an outer product.

Qin et al., "HGRN2: Gated Linear RNNs with State Expansion" (arXiv 2404.07904), section 3.

    paper                                       here
    o_t (output gate)                           q = silu(x W_q)   [T, H, K]
    f_t = beta + (1 - beta) sigmoid(x W_f)      exp(log_forget), [T, H, K]
    1 - f_t (input gate)                        k: the key *is* one minus the forget gate, [T, H, K]
    i_t (input)                                 v = x W_i         [T, H, V]
    H_t = diag(f_t) H_t-1 + (1 - f_t) x i_t     DiagonalDecay, state [H, K, V]
    y_t = o_t H_t                               o
    beta^l (lower bound of layer l)             sigmoid(lower_bound), [H, K]; none in layer 0

Choices. (1) The paper ties the lower bounds of all layers: a softmax over layers of one shared table, summed up to layer l,
minus its first row, so that layer 0 has none and upper layers remember longer. A layer here owns its row of bounds and
starts from what that table gives when fresh, l / L; nothing then forces the bounds to keep growing with l. A shared table
would tie layers that pipelining puts on different machines. (2) The norm of the outputs is an RMSNorm per head, as in the
Linear-Llama3 family, instead of over the whole width: heads stay independent. (3) q is not scaled, as in
the paper; flash-linear-attention scales by K ** -0.5, which the norm hides but for eps. (4) There is no further gate: o_t is
the output gate.

Legend: T tokens held here, D model width, H heads, K the expand ratio (key width of a head), V = D / H.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..heads import Cut, share
from ..norm import RMSNorm
from ..ops.affine import accumulate_dtype
from ..ops.diagonal_decay import DiagonalDecay
from ..sequence import SequenceShard
from .gla import check_chunk

if TYPE_CHECKING:
    from ..config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class HGRN2Config:
    """HGRN2."""

    expand_ratio: int | None = None
    """K, how often a head's value is written into its state; the head's width if left out (as published, at 128)."""

    chunk: int = 64
    """Tokens of an inner chunk; a power of two."""

    def __post_init__(self) -> None:
        if self.expand_ratio is not None and self.expand_ratio < 1:
            raise UserError(f"hgrn2.expand_ratio must be at least 1, but is {self.expand_ratio}.")
        check_chunk("hgrn2", self.chunk)


class HGRN2State(NamedTuple):
    """[H, K, V]."""

    S: Tensor | None


def forget_gate(logits: Tensor, lower_bound: Tensor | None) -> tuple[Tensor, Tensor]:
    """`log f` and `1 - f` for `f = beta + (1 - beta) sigmoid(logits)`, `beta = sigmoid(lower_bound)` (None: zero).

    Gates that remember have f near one, where `log(f)` would keep few digits: there it is taken from 1 - f.
    """
    if lower_bound is None:
        return F.logsigmoid(logits), torch.sigmoid(-logits)
    forgotten = torch.sigmoid(-lower_bound) * torch.sigmoid(-logits)
    log_sum = torch.logaddexp(F.logsigmoid(lower_bound), F.logsigmoid(-lower_bound) + F.logsigmoid(logits))
    return torch.where(forgotten < 0.5, torch.log1p(-forgotten.clamp_max(0.5)), log_sum), forgotten


class HGRN2(nn.Module):
    """[T, D] -> [T, D]; layer `layer` (from 0) of `num_layers`."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        config: HGRN2Config,
        layer: int = 0,
        num_layers: int = 1,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.num_heads, self.config, self.layer, self.num_layers = num_heads, config, layer, num_layers
        self.value_dim = hidden_size // num_heads
        self.key_dim = self.value_dim if config.expand_ratio is None else config.expand_ratio
        key = num_heads * self.key_dim
        self.widths = key, key, hidden_size
        self.qfi = nn.Linear(hidden_size, sum(self.widths), bias=False)
        self.lower_bound = nn.Parameter(torch.empty(num_heads, self.key_dim)) if layer else None
        self.norm = RMSNorm(self.value_dim, eps=norm_eps)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm.weight.no_weight_decay = True  # type: ignore[attr-defined]
        if self.lower_bound is not None:
            self.lower_bound.no_weight_decay = True  # type: ignore[attr-defined]

    @classmethod
    def build(cls, model: ModelConfig, layer: int) -> HGRN2:
        return cls(model.hidden_size, model.num_heads, model.hgrn2, layer, model.num_layers, model.norm_eps)

    def reset_parameters(self) -> None:
        """Xavier-uniform with gain 2 ** -2.5, as the family; lower bounds l / L, as a fresh shared table gives."""
        for linear in (self.qfi, self.out):
            nn.init.xavier_uniform_(linear.weight, gain=2**-2.5)
        nn.init.ones_(self.norm.weight)
        if self.lower_bound is not None:
            nn.init.constant_(self.lower_bound, math.log(self.layer / (self.num_layers - self.layer)))

    def forward(self, x: Tensor, shard: SequenceShard, state: HGRN2State | None = None) -> tuple[Tensor, HGRN2State]:
        q, f, i = self.qfi(x).split(self.widths, dim=-1)
        q, f = (tensor.unflatten(-1, (self.num_heads, self.key_dim)) for tensor in (q, f))  # [T, H, K]
        v = i.unflatten(-1, (self.num_heads, self.value_dim))  # [T, H, V]
        log_forget, k = forget_gate(f.to(accumulate_dtype(f.dtype)), self.lower_bound)
        op = DiagonalDecay(chunk=self.config.chunk)
        inputs = F.silu(q), k.to(q.dtype), v, log_forget
        o, S = shard.scan(op, inputs, None if state is None else state.S)
        return self.out(self.norm(o).flatten(1)), HGRN2State(S)  # [T, H, V] -> [T, D]

    def cuts(self) -> dict[str, Cut]:
        key, value = (self.num_heads, self.key_dim), (self.num_heads, self.value_dim)
        bound = {} if self.lower_bound is None else {"lower_bound": Cut(0, ((self.num_heads, 1),))}
        return {"qfi.weight": Cut(0, (key, key, value)), "out.weight": Cut(1, (value,)), **bound}

    def keep_heads(self, part: int, parts: int) -> None:
        self.num_heads, _ = share(self.num_heads, part, parts)
        key = self.num_heads * self.key_dim
        self.widths = key, key, self.num_heads * self.value_dim

    def flops_per_token(self, seq_length: int) -> int:
        """Forward FLOPs of one token, the recurrence in its recurrent form (decay, outer product, add, read-out)."""
        weights = self.qfi.weight.numel() + self.out.weight.numel()
        return 2 * weights + 5 * self.num_heads * self.key_dim * self.value_dim
