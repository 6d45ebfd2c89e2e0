"""S4D: every channel a diagonal state-space model of its own.

Gu, Gupta, Goel & Ré, "On the Parameterization and Initialization of Diagonal State Space Models" (arXiv 2206.11893), and the
released minimal layer.

    paper                            here
    A_n (section 3.2)                A = -exp(log_A_real) + i A_imag, complex [D, K]; of each conjugate pair one (K = N / 2)
    Delta                            dt = exp(log_dt), [D]
    A-bar = exp(Delta A)             exp(log_decay), zero-order hold
    B-bar = (A-bar - 1) / A B        B = 1; folded into C
    y = 2 Re(C x) + D u              DiagonalSSM with c = 2 C B-bar, state complex [D, K]

    init     A_n, n = 0 .. K - 1 (section 4)
    legs     -1/2 + i w_n, the eigenvalues of HiPPO-LegS's normal part: approximates S4
    inv      -1/2 + i (N / pi) (N / (2n + 1) - 1)
    lin      -1/2 + i pi n: approximates S4-FouT

The layer: y, GELU, then a linear to twice the width and a GLU (y1 * sigmoid(y2)). What the reference leaves open: B stays 1 (it
and C matter only through their product), and A's real part is kept negative by an exponential.

Legend: T tokens held here, D model width, K complex states of a channel.
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

INITS = ("legs", "inv", "lin")


@dataclass(frozen=True, kw_only=True)
class S4DConfig:
    """S4D."""

    state_size: int = 64
    """N, the real states of a channel; N / 2 complex ones are held."""

    init: str = "legs"
    """Initial eigenvalues: legs, inv or lin."""

    dt_min: float = 1e-3
    """Smallest initial step."""

    dt_max: float = 0.1
    """Largest initial step."""

    chunk: int = 32
    """Tokens of an inner chunk."""

    def __post_init__(self) -> None:
        if self.init not in INITS:
            raise UserError(f"s4d.init {self.init!r} is none of {', '.join(INITS)}.")
        if self.state_size < 2 or self.state_size % 2:
            raise UserError(f"s4d.state_size {self.state_size} must be even, since states come in conjugate pairs.")


class S4DState(NamedTuple):
    """[D, K, 2], the complex state as real and imaginary parts."""

    S: Tensor | None


def initial_frequencies(init: str, state_size: int) -> Tensor:
    """Imaginary parts of the initial eigenvalues, float64 [state_size / 2]."""
    if init == "legs":
        return hippo_normal(state_size)[0]
    n = torch.arange(state_size // 2, dtype=torch.float64, device="cpu")
    return math.pi * n if init == "lin" else state_size / math.pi * (state_size / (2 * n + 1) - 1)


class S4D(nn.Module):
    """[T, D] -> [T, D]."""

    def __init__(self, hidden_size: int, config: S4DConfig) -> None:
        super().__init__()
        self.config, self.hidden_size = config, hidden_size
        self.num_channels, self.first_channel = hidden_size, 0  # of the channels owned here, the first among all
        shape = (hidden_size, config.state_size // 2)
        self.log_dt = nn.Parameter(torch.empty(hidden_size))
        self.log_A_real = nn.Parameter(torch.empty(shape))
        self.A_imag = nn.Parameter(torch.empty(shape))
        self.C = nn.Parameter(torch.empty(*shape, 2))  # real and imaginary part
        self.D = nn.Parameter(torch.empty(hidden_size))
        self.out = nn.Linear(hidden_size, 2 * hidden_size)
        for parameter in (self.log_dt, self.log_A_real, self.A_imag, self.D, self.out.bias):
            parameter.no_weight_decay = True  # type: ignore[attr-defined]

    @classmethod
    def build(cls, model: ModelConfig, layer: int) -> S4D:
        return cls(model.hidden_size, model.s4d)

    def reset_parameters(self) -> None:
        """As released: C and D normal, dt log-uniform, A by name."""
        with torch.no_grad():
            self.log_dt.uniform_(math.log(self.config.dt_min), math.log(self.config.dt_max))
            self.log_A_real.fill_(math.log(0.5))
            self.A_imag.copy_(initial_frequencies(self.config.init, self.config.state_size).expand_as(self.A_imag))
            self.C.normal_(std=math.sqrt(0.5))
            self.D.normal_()
        self.out.reset_parameters()

    def constants(self) -> tuple[Tensor, Tensor]:
        """Log decay and read-out of the recurrence, complex [D, K] each."""
        dtype = accumulate_dtype(self.log_dt.dtype)
        A = torch.complex(-self.log_A_real.to(dtype).exp(), self.A_imag.to(dtype))
        dt = self.log_dt.to(dtype).exp()[:, None]
        return dt * A, 2 * torch.view_as_complex(self.C.to(dtype)) * zero_order_hold(dt * A, dt)

    def forward(self, x: Tensor, shard: SequenceShard, state: S4DState | None = None) -> tuple[Tensor, S4DState]:
        before = None if state is None or state.S is None else torch.view_as_complex(state.S)
        x = x.narrow(-1, self.first_channel, self.num_channels)
        y, S = shard.scan(DiagonalSSM(self.config.chunk), (x, *self.constants()), before)
        y = F.gelu(torch.addcmul(y, x, self.D.to(x.dtype)))
        y = F.glu(self.out(shard.head_sum(self.placed(y))), dim=-1)  # every output reads all channels
        return self.placed(y), S4DState(None if S is None else torch.view_as_real(S))

    def placed(self, y: Tensor) -> Tensor:
        """The channels owned here among all of them, zero elsewhere, for a sum over owners; [T, owned] -> [T, D]."""
        if self.num_channels == self.hidden_size:
            return y
        return F.pad(y, (self.first_channel, self.hidden_size - self.first_channel - self.num_channels))

    def cuts(self) -> dict[str, Cut]:
        channels = (self.num_channels, 1)
        names = ("log_dt", "log_A_real", "A_imag", "C", "D")
        return {
            **{name: Cut(0, (channels,)) for name in names},
            "out.weight": Cut(0, (channels, channels)),
            "out.bias": Cut(0, (channels, channels)),
        }

    def keep_heads(self, part: int, parts: int) -> None:
        self.num_channels, self.first_channel = share(self.num_channels, part, parts)

    def flops_per_token(self, seq_length: int) -> int:
        """Forward FLOPs of one token, the recurrence in its recurrent form (complex multiply 6, add 2, real read-out 4)."""
        return 2 * self.out.weight.numel() + 12 * self.A_imag.numel()
