"""ParaGRU: a GRU with diagonal recurrent weights, trained for all tokens at once by Newton's method.

Danieli et al., "ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for Large Language Models" (arXiv 2510.21450). The
states of all tokens solve one system `h_t = f(h_t-1, x_t)`. A step of Newton's method from a guess p of what each token finds
(p_t = h_t-1) is an affine recurrence, so one exchange:

    h_t = J_t h_t-1 + (f(p_t, x_t) - J_t p_t),    J_t = df/dh at p_t                     eq. 2.4

    paper                                    here
    A_z, A_r, A_h (diagonal, eq. 3.3)        recurrent [3, E]
    B_z, B_r, B_h (a block for each head)    input_weight [3, H, E / H, E / H]
    b_z, b_r, b_h                            input_bias [3, E]
    z = sigmoid(A_z h + B_z x + b_z)         z [T, E], the share of the state that is replaced
    r = sigmoid(A_r h + B_r x + b_r)         r [T, E]
    c = tanh(A_h (h r) + B_h x + b_h)        c [T, E]
    h_t = (1 - z) h_t-1 + z c                eq. 3.1a
    J = df/dh (diagonal, eq. 3.2a)           by hand in `cell`

Where the iteration starts: p = 0 for every token, so the first step needs nothing from a neighbour (the paper starts from
h = f(0, x), one fixed-point step ahead). The op returns what each token *finds*, so that a step is one exchange and nothing
else. Fixed: `iterations` exchanges. Adaptive (`tolerance` > 0): the steps end when the guess moved by less than that, measured
over the whole sequence, so that every rank ends after the same number of steps. A stream of one token (generation) starts from
its state and takes one step, which is the plain cell.

Gradient: the last step is differentiated with p and J held constant, `dh_t = J_t dh_t-1 + df(p_t, x_t)`: the implicit
function theorem at p, one reverse exchange with J^T (eq. 2.6). Where the iteration has converged this is backpropagation
through time; where it has not, it is the gradient of the system linearised at p, the guess before the last step. It is the
same on any number of ranks at equal iterations. The paper takes three steps and linearises at the third guess; so do we, and
the fourth step, which the differentiable linear system is, refines the states once more. Errors of the states at initial
weights after 1 .. 4 steps, measured: 7e-2, 9e-4, 4e-7, 2e-13.

Newton converges fast where the cell does not amplify: recurrent weights are `bound tanh(weight / bound)`, and start in
[-1/2, 1/2]; the update gate's biases start at -1 .. -5, memories of about 4 to 150 tokens. States of the cell lie in [-1, 1],
so guesses are held there; one that overflowed starts again from 0.

The layer is that of Mamba-2 (as the paper's): projection to x and a gate, short convolution, cell, gated RMSNorm, projection.
What the paper leaves open: biases and the bound.

Legend: T tokens held here, D model width, E inner width, H heads of the input maps.
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
from ..ops.convolution import causal_conv
from ..ops.newton import AffineScan
from ..sequence import SequenceShard

if TYPE_CHECKING:
    from ..config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ParaRNNConfig:
    """What the cells of the family share."""

    expand: int = 1
    """Inner width / hidden_size."""

    num_heads: int = 2
    """Blocks of the input maps B; the inner width must be a multiple of it."""

    conv_width: int = 4
    """Taps of the causal depthwise convolution before the cell."""

    iterations: int = 4
    """Steps of Newton's method, an exchange each: the published three, and one that is differentiated. With a tolerance, the
    most of them."""

    tolerance: float = 0.0
    """Stop when a step moved the states by less than this, root mean square over the sequence; 0 is a fixed number of steps."""

    bound: float = 2.0
    """No recurrent weight is larger. With all weights at 2 some fifteen steps reach the plain cell; at 4, eighty do not."""

    chunk: int = 32
    """Tokens of an inner chunk."""

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise UserError(f"iterations must be at least 1, but is {self.iterations}.")
        if self.tolerance < 0 or self.bound <= 0:
            raise UserError(f"tolerance {self.tolerance} cannot be negative, and bound {self.bound} must be positive.")


@dataclass(frozen=True, kw_only=True)
class ParaGRUConfig(ParaRNNConfig):
    """ParaGRU."""


class ParaRNNState(NamedTuple):
    """`conv` [conv_width - 1, E], the last inputs of the convolution, and `h` [E], or [E, 2, 1] for ParaLSTM."""

    conv: Tensor | None
    h: Tensor | None


class ParaRNN(nn.Module):
    """[T, D] -> [T, D]. A subclass has a cell, whose state is [E] or [E, k, 1]."""

    state_width = 1  # k; a state of width 1 has no axes for it
    memory_gate = 0, -1.0  # index among the inputs, and sign of the biases with which it remembers
    num_recurrent = 3

    def __init__(self, hidden_size: int, config: ParaRNNConfig, num_layers: int = 1, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.config, self.num_layers, self.norm_eps = config, num_layers, norm_eps
        self.inner = config.expand * hidden_size
        if self.inner % config.num_heads:
            raise UserError(f"num_heads {config.num_heads} must divide expand * hidden_size = {self.inner}.")
        self.num_heads, self.owners = config.num_heads, 1
        width = self.inner // config.num_heads
        self.in_proj = nn.Linear(hidden_size, 2 * self.inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(self.inner, config.conv_width))
        self.conv_bias = nn.Parameter(torch.empty(self.inner))
        self.input_weight = nn.Parameter(torch.empty(3, config.num_heads, width, width))
        self.input_bias = nn.Parameter(torch.empty(3, self.inner))
        self.recurrent = nn.Parameter(torch.empty(self.num_recurrent, self.inner))
        self.norm_weight = nn.Parameter(torch.empty(self.inner))
        self.out_proj = nn.Linear(self.inner, hidden_size, bias=False)
        for parameter in (self.conv_bias, self.input_bias, self.recurrent, self.norm_weight):
            parameter.no_weight_decay = True  # type: ignore[attr-defined]

    def reset_parameters(self) -> None:
        """Input maps Xavier-uniform, recurrent weights U(-1/2, 1/2), a gate that remembers for 4 to 150 tokens."""
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()
        gate, sign = self.memory_gate
        with torch.no_grad():
            self.out_proj.weight.div_(math.sqrt(self.num_layers))
            bound = self.config.conv_width**-0.5
            self.conv_weight.uniform_(-bound, bound)
            self.conv_bias.uniform_(-bound, bound)
            bound = (3 / self.input_weight.shape[-1]) ** 0.5
            self.input_weight.uniform_(-bound, bound)
            self.recurrent.uniform_(-0.5, 0.5)
            self.input_bias.zero_()
            self.input_bias[gate].copy_(torch.linspace(1, 5, self.inner)).mul_(sign)
            self.norm_weight.fill_(1)

    def cell(self, p: Tensor, inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """`f` and its Jacobian at states p: [T, E] both, or [T, E, k, 1] and [T, E, k, k].

        Args:
            inputs: B x + b of each gate, [T, E] each.
            weights: bounded recurrent weights, [E] each.
        """
        raise NotImplementedError

    def output(self, h: Tensor) -> Tensor:
        """What of a state is read, [T, E]."""
        raise NotImplementedError

    def forward(self, x: Tensor, shard: SequenceShard, state: ParaRNNState | None = None) -> tuple[Tensor, ParaRNNState]:
        x, gate = self.in_proj(x).chunk(2, dim=-1)  # [T, D] -> [T, E] each
        context, conv_state = shard.halo(x, self.config.conv_width - 1, None if state is None else state.conv)
        x = causal_conv(x, context, self.conv_weight, self.conv_bias, shard.segments, activation="silu")
        heads = x.unflatten(-1, (self.num_heads, -1))
        inputs = torch.einsum("thi,ghij->gthj", heads, self.input_weight.to(x.dtype)).flatten(2)  # [3, T, E]
        wide = accumulate_dtype(x.dtype)
        inputs = inputs.to(wide) + self.input_bias.to(wide)[:, None]
        h, final = self.solve(inputs, shard, None if state is None else state.h)
        y = self.output(h).to(gate.dtype) * F.silu(gate)
        return self.out_proj(self.norm(y, shard)), ParaRNNState(conv_state, final)

    def norm(self, y: Tensor, shard: SequenceShard) -> Tensor:
        """RMSNorm over the whole inner width, of which [T, E] is owned here."""
        if self.owners == 1:
            normed = F.rms_norm(y, y.shape[-1:], eps=self.norm_eps)
        else:
            wide = y.to(accumulate_dtype(y.dtype))
            mean = shard.head_sum(wide.square().sum(-1, keepdim=True)) / (self.owners * y.shape[-1])
            normed = (wide * torch.rsqrt(mean + self.norm_eps)).to(y.dtype)
        return normed * self.norm_weight.to(y.dtype)

    def solve(self, inputs: Tensor, shard: SequenceShard, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The state after each token, and after the stream.

        Args:
            inputs: [3, T, E]; the state [E], or [E, k, 1].
        """
        config = self.config
        weights = (config.bound * (self.recurrent.to(inputs.dtype) / config.bound).tanh()).unbind()
        one = inputs.shape[1:] if self.state_width == 1 else (*inputs.shape[1:], self.state_width, 1)
        p = inputs.new_zeros(one)
        steps = config.iterations
        if shard.documents.num_tokens == 1:
            steps = 1
            if state is not None and shard.documents.first_position:
                p = state.detach().to(p.dtype).expand_as(p)
        op = AffineScan(chunk=config.chunk)
        with torch.no_grad():
            for _ in range(steps - 1):
                f, J = self.cell(p, inputs.unbind(), weights)
                found, _ = shard.scan(op, (J, f - self.times(J, p)), state)
                found = found.nan_to_num(0.0, 0.0, 0.0).clamp(-1, 1)
                moved, p = found - p, found
                if config.tolerance and self.mean_square(moved, shard) <= config.tolerance**2:
                    break
        f, J = self.cell(p, inputs.unbind(), weights)
        J = J.detach()
        b = f - self.times(J, p)
        found, final = shard.scan(op, (J, b), state)
        return self.times(J, found) + b, final

    def times(self, J: Tensor, h: Tensor) -> Tensor:
        """`J h` of each token."""
        if self.state_width == 1:
            return J * h
        columns = range(self.state_width)  # a sum over an axis of two is slower than two terms
        return sum((J[..., j : j + 1] * h[..., j : j + 1, :] for j in columns[1:]), J[..., :1] * h[..., :1, :])

    def mean_square(self, moved: Tensor, shard: SequenceShard) -> float:
        """Over all entries of all tokens of the sequence, wherever they are held: the same number on every rank."""
        entries = self.owners * math.prod(moved.shape[1:])
        total = shard.head_sum(shard.total(moved.flatten(1).square().sum(1)))
        return total.item() / (entries * max(shard.documents.num_tokens, 1))

    def cuts(self) -> dict[str, Cut]:
        """Heads of the input maps; everything else is a channel's own but the norm."""
        heads = (self.num_heads, self.inner // self.num_heads)
        return {
            "in_proj.weight": Cut(0, (heads, heads)),
            **{name: Cut(0, (heads,)) for name in ("conv_weight", "conv_bias", "norm_weight")},
            "input_weight": Cut(1, ((self.num_heads, 1),)),
            "input_bias": Cut(1, (heads,)),
            "recurrent": Cut(1, (heads,)),
            "out_proj.weight": Cut(1, (heads,)),
        }

    def keep_heads(self, part: int, parts: int) -> None:
        width, self.owners = self.inner // self.num_heads, parts
        self.num_heads, _ = share(self.num_heads, part, parts)
        self.inner = self.num_heads * width

    def flops_per_token(self, seq_length: int) -> int:
        """Forward FLOPs of one token as the plain cell: weights, and about 10 for each entry of a gate."""
        weights = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        weights += self.conv_weight.numel() + self.input_weight.numel()
        return 2 * weights + 30 * self.inner


class ParaGRU(ParaRNN):
    """[T, D] -> [T, D], state [E]."""

    @classmethod
    def build(cls, model: ModelConfig, layer: int) -> ParaGRU:
        return cls(model.hidden_size, model.paragru, model.num_layers, model.norm_eps)

    def cell(self, p: Tensor, inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        (x_z, x_r, x_c), (a_z, a_r, a_c) = inputs, weights
        z, r = torch.sigmoid(a_z * p + x_z), torch.sigmoid(a_r * p + x_r)
        c = torch.tanh(a_c * (p * r) + x_c)
        f = (1 - z) * p + z * c
        dz, dr = z * (1 - z) * a_z, r * (1 - r) * a_r
        dc = (1 - c * c) * a_c * (r + p * dr)
        return f, (1 - z) + (c - p) * dz + z * dc

    def output(self, h: Tensor) -> Tensor:
        return h
