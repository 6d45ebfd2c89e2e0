"""S5: one diagonal state-space model that reads and writes all channels.

Smith, Warrington & Linderman, "Simplified State Space Layers for Sequence Modeling" (arXiv 2208.04933).

    paper                            here
    Lambda (eq. 5)                   A = -exp(log_A_real) + i A_imag, complex [K]; of each conjugate pair one (K = P / 2)
    Delta, one a state (sec. 3.2)    dt = exp(log_dt), [K]
    Lambda-bar = exp(Lambda Delta)   exp(log_decay), zero-order hold (eq. 6)
    B-tilde = V^-1 B, C-tilde = C V  B complex [K, D], C complex [D, K], as real and imaginary parts
    B-bar = (L-bar - 1) / L B-tilde  applied before the scan, token by token: [T, D] -> complex [T, K]
    x_k = L-bar x + B-bar u          DiagonalSSM over K channels of one state each, complex
    y = 2 Re(C-tilde x) + D u        after the scan, token by token

Lambda starts from J blocks of HiPPO-LegS's normal part (HiPPO-N, section 3.2). The layer's non-linearity is the released
`half_glu1`: g = GELU(y), g * sigmoid(W g). What the reference leaves open: Lambda's real part is kept negative by an
exponential instead of by clipping; B and C are lecun-normal, not truncated.

Legend: T tokens held here, D model width, K complex states.
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
from ..ops.affine import accumulate_dtype
from ..ops.diagonal_ssm import DiagonalSSM
from ..ops.diagonal_ssm.hippo import hippo_normal, zero_order_hold
from ..sequence import SequenceShard

if TYPE_CHECKING:
    from ..config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class S5Config:
    """S5."""

    state_size: int = 64
    """P, the real size of the state; P / 2 complex numbers are held."""

    blocks: int = 1
    """J: the initial state matrix is this many blocks of HiPPO-N."""

    dt_min: float = 1e-3
    """Smallest initial step."""

    dt_max: float = 0.1
    """Largest initial step."""

    chunk: int = 32
    """Tokens of an inner chunk."""

    def __post_init__(self) -> None:
        if self.blocks < 1 or self.state_size < 2 or self.state_size % (2 * self.blocks):
            raise UserError(
                f"s5.state_size {self.state_size} must be a multiple of 2 * s5.blocks = {2 * self.blocks}, "
                "since every block's states come in conjugate pairs."
            )


class S5State(NamedTuple):
    """[K, 2], the complex state as real and imaginary parts."""

    S: Tensor | None


class S5(nn.Module):
    """[T, D] -> [T, D]."""

    def __init__(self, hidden_size: int, config: S5Config) -> None:
        super().__init__()
        self.config, self.hidden_size = config, hidden_size
        self.num_states = config.state_size // 2
        self.num_gates, self.first_gate = hidden_size, 0  # of the gated channels owned here, the first among all
        self.log_dt = nn.Parameter(torch.empty(self.num_states))
        self.log_A_real = nn.Parameter(torch.empty(self.num_states))
        self.A_imag = nn.Parameter(torch.empty(self.num_states))
        self.B = nn.Parameter(torch.empty(self.num_states, hidden_size, 2))
        self.C = nn.Parameter(torch.empty(hidden_size, self.num_states, 2))
        self.D = nn.Parameter(torch.empty(hidden_size))
        self.gate = nn.Linear(hidden_size, hidden_size)
        for parameter in (self.log_dt, self.log_A_real, self.A_imag, self.D, self.gate.bias):
            parameter.no_weight_decay = True  # type: ignore[attr-defined]

    @classmethod
    def build(cls, model: ModelConfig, layer: int) -> S5:
        return cls(model.hidden_size, model.s5)

    def reset_parameters(self) -> None:
        """B and C lecun-normal in HiPPO's basis, turned into that of its eigenvectors; D normal, dt log-uniform."""
        config = self.config
        frequencies, vectors = hippo_normal(config.state_size // config.blocks)
        V = torch.block_diag(*[vectors] * config.blocks).to(self.B.device, accumulate_dtype(self.B.dtype).to_complex())
        real = V.real
        with torch.no_grad():
            self.log_dt.uniform_(math.log(config.dt_min), math.log(config.dt_max))
            self.log_A_real.fill_(math.log(0.5))
            self.A_imag.copy_(frequencies.repeat(config.blocks))
            B = real.new_empty(config.state_size, self.hidden_size).normal_(std=self.hidden_size**-0.5)
            self.B.copy_(torch.view_as_real(V.mH @ B.to(V.dtype)))
            C = V.new_empty(self.hidden_size, config.state_size).normal_(std=config.state_size**-0.5)
            self.C.copy_(torch.view_as_real(C @ V))
            self.D.normal_()
        self.gate.reset_parameters()

    def forward(self, x: Tensor, shard: SequenceShard, state: S5State | None = None) -> tuple[Tensor, S5State]:
        dtype = accumulate_dtype(self.B.dtype)
        A = torch.complex(-self.log_A_real.to(dtype).exp(), self.A_imag.to(dtype))
        dt = self.log_dt.to(dtype).exp()
        log_decay = dt * A
        B = torch.view_as_complex(self.B.to(dtype)) * zero_order_hold(log_decay, dt)[:, None]
        B = torch.view_as_real(B).transpose(1, 2).flatten(0, 1)  # [K, D] -> [2 K, D]
        Bu = F.linear(x, B.to(x.dtype)).to(dtype).unflatten(-1, (-1, 2))  # [T, D] -> [T, K, 2]
        before = None if state is None or state.S is None else torch.view_as_complex(state.S)[:, None]
        inputs = (torch.view_as_complex(Bu), log_decay[:, None], torch.ones_like(log_decay)[:, None])
        h, S = shard.scan(DiagonalSSM(self.config.chunk), inputs, before)
        C = 2 * torch.stack([self.C[..., 0], -self.C[..., 1]], dim=-1).flatten(1)  # 2 Re(C h), [D, 2 K]
        y = shard.head_sum(F.linear(torch.view_as_real(h).flatten(1).to(x.dtype), C.to(x.dtype)))  # over all states
        y = F.gelu(torch.addcmul(y, x, self.D.to(x.dtype)))
        gated = y.narrow(-1, self.first_gate, self.num_gates) * self.gate(y).sigmoid()
        y = F.pad(gated, (self.first_gate, self.hidden_size - self.first_gate - self.num_gates))  # owners' sum is whole
        return y, S5State(None if S is None else torch.view_as_real(S[:, 0]))

    def cuts(self) -> dict[str, Cut]:
        states, gates = (self.num_states, 1), Cut(0, ((self.num_gates, 1),))
        return {
            **{name: Cut(0, (states,)) for name in ("log_dt", "log_A_real", "A_imag", "B")},
            "C": Cut(1, (states,)),
            "gate.weight": gates,
            "gate.bias": gates,
        }

    def keep_heads(self, part: int, parts: int) -> None:
        self.num_states, _ = share(self.num_states, part, parts)
        self.num_gates, self.first_gate = share(self.num_gates, part, parts)

    def flops_per_token(self, seq_length: int) -> int:
        """Forward FLOPs of one token, the recurrence in its recurrent form (complex multiply 6, add 2)."""
        return 2 * (self.B.numel() + self.C.numel() + self.gate.weight.numel()) + 8 * self.num_states
