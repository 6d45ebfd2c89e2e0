"""ParaLSTM: an LSTM with peepholes, coupled gates and diagonal recurrent weights, trained for all tokens at once.

Danieli et al., "ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for Large Language Models" (arXiv 2510.21450). The
method, the layer, the start of the iteration and the gradient are those of `paragru.py`; a channel's state is a pair, so a
step of Newton's method is an affine recurrence of 2 x 2 blocks.

    paper                                                here
    A_f, A_z, A_o, C_f, C_o (diagonal, eq. 3.3)          recurrent [5, E], in this order
    B_f, B_z, B_o and their biases                       input_weight, input_bias
    f = sigmoid(A_f h + C_f c + B_f x + b_f)             f [T, E], the share of the cell that is kept
    z = tanh(A_z h + B_z x + b_z)                        z [T, E]
    c_t = f c_t-1 + (1 - f) z                            cell: state[..., 0, 0]
    o = sigmoid(A_o h + C_o c_t + B_o x + b_o)           o [T, E]
    h_t = o tanh(c_t)                                    read-out: state[..., 1, 0]; eq. 3.1b
    J (2 x 2 blocks over (c, h), eq. 3.2b)               by hand in `cell`

Legend: T tokens held here, D model width, E inner width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .paragru import ParaRNN, ParaRNNConfig

if TYPE_CHECKING:
    from ..config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ParaLSTMConfig(ParaRNNConfig):
    """ParaLSTM."""


class ParaLSTM(ParaRNN):
    """[T, D] -> [T, D], state [E, 2, 1]: the cell c and the read-out h."""

    state_width = 2
    memory_gate = 0, 1.0
    num_recurrent = 5

    @classmethod
    def build(cls, model: ModelConfig, layer: int) -> ParaLSTM:
        return cls(model.hidden_size, model.paralstm, model.num_layers, model.norm_eps)

    def cell(self, p: Tensor, inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        (x_f, x_z, x_o), (a_f, a_z, a_o, c_f, c_o) = inputs, weights
        c, h = p[..., 0, 0], p[..., 1, 0]
        f, z = torch.sigmoid(a_f * h + c_f * c + x_f), torch.tanh(a_z * h + x_z)
        new = f * c + (1 - f) * z
        o, squashed = torch.sigmoid(a_o * h + c_o * new + x_o), new.tanh()
        df = (c - z) * f * (1 - f)  # what the forget gate's argument does to the cell
        do = o * (1 - o) * squashed  # what the output gate's argument does to the read-out
        slope = o * (1 - squashed * squashed)
        cc, ch = f + df * c_f, df * a_f + (1 - f) * (1 - z * z) * a_z  # of the cell, by c and by h
        hc, hh = do * c_o * cc + slope * cc, do * (a_o + c_o * ch) + slope * ch
        J = torch.stack([torch.stack([cc, ch], -1), torch.stack([hc, hh], -1)], -2)
        return torch.stack([new, o * squashed], -1)[..., None], J

    def output(self, h: Tensor) -> Tensor:
        return h[..., 1, 0]
