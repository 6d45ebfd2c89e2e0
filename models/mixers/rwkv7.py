"""RWKV-7's time mixing.

Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution" (arXiv 2503.14456), section 4 and its appendix on
initialisation; names of parameters as in the released code.

    paper                                                 here
    lerp(x_t, x_t-1, mu)                                  token shift: x + (x_prev - x) mu, one mu for each of r w k v a g
    w_t = exp(-e^-0.5 sigmoid(d_t))                       exp(log_decay), log decay in (-0.607, 0), [T, H, K]
    a_t = sigmoid(loramlp(x))                             a, the in-context learning rate [T, H, K]
    kappa = k xi, normalised per head                     removal, xi = k_k
    k~ = k lerp(1, a, alpha)                              k (1 + (a - 1) k_a)
    wkv_t = wkv_t-1 (diag(w) - kappa^T (a kappa)) + v^T k~    DeltaRule with two writes; state [H, K, V], transposed:
                                                          S_t = diag(w) S + (a kappa)^T (-kappa S) + k~^T v
    r_t wkv_t^T, group norm, + (r (rho k~)^T) v, * g, W_o     norm, rho = r_k, gate

The op decays first and reads then, so it reads with kappa / w, which is safe: w > 0.545. Both writes keep their own direction.

What we leave out, by choice: the value residual (later layers mix the first layer's v into theirs); a mixer here sees its own
input only. The channel mixing is the model's FFN.

Legend: T tokens held here, D model width, H heads, K = V = D / H.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..heads import Cut, share
from ..ops.convolution import causal_conv
from ..ops.delta_rule import DeltaRule
from ..sequence import SequenceShard

if TYPE_CHECKING:
    from ..config import ModelConfig

DECAY_SCALE = -0.6065306597126334  # -exp(-0.5)
STREAMS = ("r", "w", "k", "v", "a", "g")


@dataclass(frozen=True, kw_only=True)
class RWKV7Config:
    """RWKV-7."""

    decay_rank: int | None = None
    """Inner width of the decay's low-rank map; 2.5 sqrt(D) rounded to a multiple of 32 if left out."""

    rate_rank: int | None = None
    """Inner width of the in-context rate's; 2.5 sqrt(D) rounded to a multiple of 32 if left out."""

    gate_rank: int | None = None
    """Inner width of the output gate's; 5 sqrt(D) rounded to a multiple of 32 if left out."""

    chunk: int = 64
    """Tokens of an inner chunk, a power of two."""

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.chunk & (self.chunk - 1):
            raise UserError(f"rwkv7.chunk must be a power of two, but is {self.chunk}; try 64.")


class RWKV7State(NamedTuple):
    """`shift` [1, D], the last input, and `S` [H, K, V]."""

    shift: Tensor | None
    S: Tensor | None


class RWKV7(nn.Module):
    """[T, D] -> [T, D].

    Args:
        layer, num_layers: where the mixer stands, which its initialisation depends on.
    """

    shift_taps: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        config: RWKV7Config,
        norm_eps: float = 1e-5,
        layer: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.config = num_heads, hidden_size // num_heads, config
        self.norm_eps, self.layer, self.num_layers = norm_eps * self.head_dim, layer, num_layers

        def rank(given: int | None, factor: float) -> int:
            return given or max(32, round(factor * hidden_size**0.5 / 32) * 32)

        decay, rate = rank(config.decay_rank, 2.5), rank(config.rate_rank, 2.5)
        gate = rank(config.gate_rank, 5.0)
        self.mix = nn.Parameter(torch.empty(len(STREAMS), hidden_size))  # x_r, x_w, x_k, x_v, x_a, x_g
        self.r, self.k, self.v, self.out = (nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(4))
        self.decay_down, self.decay_up = nn.Linear(hidden_size, decay, bias=False), nn.Linear(decay, hidden_size)
        self.rate_down, self.rate_up = nn.Linear(hidden_size, rate, bias=False), nn.Linear(rate, hidden_size)
        self.gate_down, self.gate_up = (
            nn.Linear(hidden_size, gate, bias=False),
            nn.Linear(gate, hidden_size, bias=False),
        )
        self.k_k, self.k_a = nn.Parameter(torch.empty(hidden_size)), nn.Parameter(torch.empty(hidden_size))
        self.r_k = nn.Parameter(torch.empty(num_heads, self.head_dim))
        self.norm_weight, self.norm_bias = nn.Parameter(torch.empty(hidden_size)), nn.Parameter(torch.empty(hidden_size))
        taps = torch.tensor([1.0, -1.0]).repeat(hidden_size, 1)  # the token before minus the token
        self.register_buffer("shift_taps", taps, persistent=False)
        decayed = {linear.weight for linear in (self.r, self.k, self.v, self.out)}
        for parameter in self.parameters():
            if parameter not in decayed:
                parameter.no_weight_decay = True  # type: ignore[attr-defined]

    @classmethod
    def build(cls, model: ModelConfig, layer: int) -> RWKV7:
        return cls(model.hidden_size, model.num_heads, model.rwkv7, model.norm_eps, layer, model.num_layers)

    def reset_parameters(self) -> None:
        """As released: by depth and channel; maps into low ranks and the output start at zero."""
        width = self.r.weight.shape[0]
        depth = self.layer / max(self.num_layers - 1, 1)  # 0 to 1
        rest = 1 - self.layer / self.num_layers  # 1 to almost 0
        with torch.no_grad():
            self.shift_taps.copy_(torch.tensor([1.0, -1.0]))
            channel = torch.arange(width, dtype=self.mix.dtype, device=self.mix.device)
            share = channel / width
            linear = channel / max(width - 1, 1) - 0.5
            zigzag = 2 * (channel % self.head_dim) / max(self.head_dim - 1, 1) - 1
            zigzag = zigzag * zigzag.abs()
            for row, power in zip(self.mix, (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)):
                row.copy_(1 - share ** (power * rest))
            speed = -6 + 6 * (channel / max(width - 1, 1)) ** (1 + depth**0.3)
            for down, up in (
                (self.decay_down, self.decay_up),
                (self.rate_down, self.rate_up),
                (self.gate_down, self.gate_up),
            ):
                nn.init.zeros_(down.weight)
                rows, columns = up.weight.shape
                nn.init.orthogonal_(up.weight, gain=0.1 * max(1.0, columns / rows) ** 0.5)
            self.decay_up.bias.copy_(speed + 0.5 + 2.5 * zigzag)
            self.rate_up.bias.copy_(-0.19 + 0.3 * zigzag + 0.4 * linear)
            self.k_k.copy_(0.71 - 0.1 * linear)
            self.k_a.fill_(1.02)
            self.r_k.fill_(-0.04)
            for linear_map, scale in ((self.r, 0.5), (self.k, 0.05), (self.v, 0.5)):
                linear_map.weight.uniform_(-scale * width**-0.5, scale * width**-0.5)
            self.out.weight.zero_()
            self.norm_weight.fill_(((1 + self.layer) / self.num_layers) ** 0.7)
            self.norm_bias.zero_()

    def forward(self, x: Tensor, shard: SequenceShard, state: RWKV7State | None = None) -> tuple[Tensor, RWKV7State]:
        context, shift_state = shard.halo(x, 1, None if state is None else state.shift)
        delta = causal_conv(x, context, self.shift_taps.to(x.dtype), None, shard.segments)
        r, w, k, v, a, g = (torch.addcmul(x, delta, mix.to(x.dtype)) for mix in self.mix)  # [T, D] each
        log_decay = DECAY_SCALE * self.decay_up(torch.tanh(self.decay_down(w))).to(self.k_k.dtype).sigmoid()
        a = self.rate_up(self.rate_down(a)).sigmoid()
        g = self.gate_up(self.gate_down(g).sigmoid())
        r, k, v = self.r(r), self.k(k), self.v(v)
        removal = F.normalize(self.by_head(k * self.k_k.to(k.dtype)), dim=-1)
        k = self.by_head(k * (1 + (a - 1) * self.k_a.to(k.dtype)))
        r, v, a, log_decay = (self.by_head(tensor) for tensor in (r, v, a, log_decay))  # [T, D] -> [T, H, K]
        read = (-removal * torch.exp(-log_decay)).to(k.dtype)
        inputs = (r, k, v, read, a * removal, log_decay)
        o, S = shard.scan(DeltaRule(self.config.chunk), inputs, None if state is None else state.S)
        o = self.group_norm(o) + (r * k * self.r_k.to(k.dtype)).sum(-1, keepdim=True) * v
        return self.out(o.flatten(1) * g), RWKV7State(shift_state, S)

    def by_head(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, H, K]."""
        return x.unflatten(-1, (self.num_heads, self.head_dim))

    def group_norm(self, o: Tensor) -> Tensor:
        """Layer norm of each head, [T, H, V]."""
        weight, bias = (self.by_head(parameter).to(o.dtype) for parameter in (self.norm_weight, self.norm_bias))
        return F.layer_norm(o, o.shape[-1:], eps=self.norm_eps) * weight + bias

    def cuts(self) -> dict[str, Cut]:
        """All but the token shift and the maps into low ranks, which heads share."""
        heads = (self.num_heads, self.head_dim)
        names = ("r", "k", "v", "decay_up", "rate_up", "gate_up")
        vectors = ("decay_up.bias", "rate_up.bias", "k_k", "k_a", "norm_weight", "norm_bias")
        return {
            **{f"{name}.weight": Cut(0, (heads,)) for name in names},
            **{name: Cut(0, (heads,)) for name in vectors},
            "r_k": Cut(0, ((self.num_heads, 1),)),
            "out.weight": Cut(1, (heads,)),
        }

    def keep_heads(self, part: int, parts: int) -> None:
        self.num_heads, _ = share(self.num_heads, part, parts)

    def flops_per_token(self, seq_length: int) -> int:
        """Forward FLOPs of one token, the recurrence in its recurrent form (decay, read, two writes, read-out)."""
        weights = sum(module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear))
        return 2 * weights + 9 * self.num_heads * self.head_dim**2
