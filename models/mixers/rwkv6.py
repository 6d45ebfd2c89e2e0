"""RWKV-6 ("Finch") time mixing.

Peng et al., "Eagle and Finch" (arXiv 2404.05892), section 4; initial values as in the released code.

    paper                                                  here
    x_t-1 (token shift)                                    previous: a halo of one token, zero at a document's start
    lerp, mu_x                                             mix_x [D]
    lora_*(x) = lambda_* + tanh(x A_*) B_*   (* in w k v r g)    mix [5, D], mix_down, mix_up [5, rank, D]
    ddlerp_*(a, b) = a + (b - a) * lora_*(a + (b - a) mu_x)      mixed, one row per token for each of w k v r g
    r_t, k_t, v_t, g_t                                     r, k, v [T, H, K], gate
    d_t = lora_d(ddlerp_d), w_t = exp(-exp(d_t))           log_decay = -exp(d), [T, H, K]
    u (bonus on the current token)                         bonus [H, K]; it never enters the state
    o_t = r_t (S_t-1 + diag(u) k_t^T v_t)                  DiagonalDecay(read_before) + the diagonal term, token by token
    S_t = diag(w_t) S_t-1 + k_t^T v_t                      state [H, K, V]
    LayerNorm per head, eps 64e-5                          norm_weight, norm_bias [D]
    y_t = (SiLU(g_t) * norm(o_t)) W_o                      out

Choices. (1) Only time mixing: the feed-forward of the block is the model's own, not RWKV's channel mixing. (2) The matrices
start Xavier-uniform with gain 2 ** -2.5 as in Linear-MoE; the release starts W_o at zero, which its own learning-rate
schedule relies on. Vectors and low-rank factors start as released. (3) The state carries the last token and S.

Legend: T tokens held here, N parts, D model width, H heads, K = V = D / H.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..heads import Cut, share
from ..ops.affine import accumulate_dtype
from ..ops.diagonal_decay import DiagonalDecay
from ..ops.segments import Segments
from ..sequence import SequenceShard
from .gla import check_chunk

if TYPE_CHECKING:
    from ..config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class RWKV6Config:
    """RWKV-6."""

    mix_low_rank: int = 32
    """Rank of the data-dependent interpolation."""

    decay_low_rank: int = 64
    """Rank of the data-dependent decay."""

    group_norm_eps: float = 64e-5
    """Added to the variance of a head's outputs."""

    chunk: int = 64
    """Tokens of an inner chunk; a power of two."""

    def __post_init__(self) -> None:
        check_chunk("rwkv6", self.chunk)


class RWKV6State(NamedTuple):
    """`last` [1, D], the last token's input, and `S` [H, K, V]."""

    last: Tensor | None
    S: Tensor | None


def token_shift(x: Tensor, context: Tensor, segments: Segments) -> Tensor:
    """The token before each token, zero at a document's start; x [T, D], context [N, 1, D] -> [T, D]."""
    bounds = segments.part_bounds
    rows = [
        torch.cat([context[part], x[start:stop]])[: stop - start] for part, (start, stop) in enumerate(zip(bounds, bounds[1:]))
    ]
    starts = segments.positions(x.device) == 0
    return torch.cat(rows).masked_fill(starts[:, None], 0)


class RWKV6(nn.Module):
    """[T, D] -> [T, D]; layer `layer` (from 0) of `num_layers`."""

    def __init__(self, hidden_size: int, num_heads: int, config: RWKV6Config, layer: int = 0, num_layers: int = 1) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.config = num_heads, hidden_size // num_heads, config
        self.layer, self.num_layers = layer, num_layers
        self.mix_x = nn.Parameter(torch.empty(hidden_size))
        self.mix = nn.Parameter(torch.empty(5, hidden_size))
        self.mix_down = nn.Linear(hidden_size, 5 * config.mix_low_rank, bias=False)
        self.mix_up = nn.Parameter(torch.empty(5, config.mix_low_rank, hidden_size))
        self.decay_down = nn.Linear(hidden_size, config.decay_low_rank, bias=False)
        self.decay_up = nn.Linear(config.decay_low_rank, hidden_size)
        self.bonus = nn.Parameter(torch.empty(num_heads, self.head_dim))
        self.receptance, self.key, self.value, self.gate, self.out = (
            nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(5)
        )
        self.norm_weight, self.norm_bias = (nn.Parameter(torch.empty(hidden_size)) for _ in range(2))
        for parameter in (self.mix_x, self.mix, self.decay_up.bias, self.bonus, self.norm_weight, self.norm_bias):
            parameter.no_weight_decay = True  # type: ignore[attr-defined]

    @classmethod
    def build(cls, model: ModelConfig, layer: int) -> RWKV6:
        return cls(model.hidden_size, model.num_heads, model.rwkv6, layer, model.num_layers)

    def reset_parameters(self) -> None:
        """As released: curves over channels that depend on the layer's depth; see choice (2) for the matrices."""
        for linear in (self.receptance, self.key, self.value, self.gate, self.out):
            nn.init.xavier_uniform_(linear.weight, gain=2**-2.5)
        for down in (self.mix_down, self.decay_down):
            nn.init.zeros_(down.weight)
        width = self.mix_x.shape[0]
        depth = self.layer / max(self.num_layers - 1, 1)  # 0 at the first layer, 1 at the last
        above = 1 - self.layer / self.num_layers
        with torch.no_grad():
            channel = torch.arange(width, dtype=torch.float64, device=self.mix_x.device)
            slow, fast = (channel / width) ** above, (channel / width) ** (above / 2)
            self.mix_x.copy_(1 - slow)
            self.mix.copy_(torch.stack([1 - slow, 1 - slow, 1 - slow - 0.3 * depth, 1 - fast, 1 - fast]))  # w k v r g
            self.mix_up.uniform_(-0.01, 0.01)
            self.decay_up.weight.uniform_(-0.01, 0.01)
            last = max(width - 1, 1)
            self.decay_up.bias.copy_(-6 + 5 * (channel / last) ** (0.7 + 1.3 * depth))
            zigzag = ((channel + 1) % 3 - 1) * 0.1
            self.bonus.copy_((depth * (1 - channel / last) + zigzag).reshape(self.bonus.shape))
            self.norm_weight.fill_(1)
            self.norm_bias.zero_()

    def forward(self, x: Tensor, shard: SequenceShard, state: RWKV6State | None = None) -> tuple[Tensor, RWKV6State]:
        context, last = shard.halo(x, 1, None if state is None else state.last)
        w, k, v, r, g = self.mixed(x, token_shift(x, context, shard.segments) - x)
        log_decay = -self.decay_up(torch.tanh(self.decay_down(w))).to(accumulate_dtype(x.dtype)).exp()
        r, k, v, log_decay = (
            tensor.unflatten(-1, (self.num_heads, self.head_dim))
            for tensor in (self.receptance(r), self.key(k), self.value(v), log_decay)
        )  # [T, D] -> [T, H, K]
        op = DiagonalDecay(read_before=True, chunk=self.config.chunk)
        o, S = shard.scan(op, (r, k, v, log_decay), None if state is None else state.S)
        o = o + (r * self.bonus.to(r.dtype) * k).sum(-1, keepdim=True) * v
        gated = self.head_norm(o) * F.silu(self.gate(g))
        return self.out(gated), RWKV6State(last, S)

    def mixed(self, x: Tensor, delta: Tensor) -> tuple[Tensor, ...]:
        """Inputs of w, k, v, r and g: between each token and the one before it, [T, D] each; delta: previous - x."""
        low = torch.tanh(self.mix_down(torch.addcmul(x, delta, self.mix_x.to(x.dtype))))
        share = torch.einsum("tsr,srd->std", low.unflatten(-1, (5, -1)), self.mix_up.to(low.dtype))  # [5, T, D]
        share = share + self.mix[:, None].to(low.dtype)
        return torch.addcmul(x, delta, share.to(x.dtype)).unbind(0)

    def head_norm(self, o: Tensor) -> Tensor:
        """Layer norm over each head's outputs, with a weight and a bias per channel, [T, H, V] -> [T, D]."""
        normed = F.layer_norm(o, o.shape[-1:], eps=self.config.group_norm_eps).flatten(1)
        return normed * self.norm_weight.to(o.dtype) + self.norm_bias.to(o.dtype)

    def cuts(self) -> dict[str, Cut]:
        """All but what mixes the input's channels with those of the token before, which heads share."""
        heads = (self.num_heads, self.head_dim)
        names = ("receptance", "key", "value", "gate", "decay_up")
        vectors = ("decay_up.bias", "norm_weight", "norm_bias")
        return {
            **{f"{name}.weight": Cut(0, (heads,)) for name in names},
            **{name: Cut(0, (heads,)) for name in vectors},
            "bonus": Cut(0, ((self.num_heads, 1),)),
            "out.weight": Cut(1, (heads,)),
        }

    def keep_heads(self, part: int, parts: int) -> None:
        self.num_heads, _ = share(self.num_heads, part, parts)

    def flops_per_token(self, seq_length: int) -> int:
        """Forward FLOPs of one token, the recurrence in its recurrent form (decay, outer product, add, read-out)."""
        linears = (self.receptance, self.key, self.value, self.gate, self.out)
        low_rank = (self.mix_down, self.decay_down, self.decay_up)
        weights = sum(linear.weight.numel() for linear in (*linears, *low_rank)) + self.mix_up.numel()
        return 2 * weights + 5 * self.num_heads * self.head_dim**2
