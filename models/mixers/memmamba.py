"""MemMamba: a Mamba layer whose input is enriched from a bounded pool of noted tokens.

Wang et al., "MemMamba: Rethinking Memory Patterns in State Space Model" (arXiv 2510.03279). There is no released code, and the
paper leaves much open: docs/memmamba.md says what we chose, and where we deviate.

    paper                                   here
    I_tok(x_t) = f_l(x_t)                   score [T] in (0, 1): D -> D/4, ReLU, -> 1, sigmoid; float32 at least
    s_t = N_l(x_t) if I_tok > tau_1         note: score * (W_note x), width W; the factor is how the scorer learns
    S_l, 50 slots, FIFO or priority         a pool for each block of B tokens, of the blocks before it (ops/pool), [M, K, W + 3]
    c_tok = Attn(x_t, S_l) if I_state > tau_2   W_o read(W_q x, pool), times sigmoid(w x + b): the trigger looks at the input
    c_lay = Attn(x'_t, {S_j : j in R(l)})   the same with the pools of up to p layers before, at every p-th layer
    x'' = x + F_tok + F_lay                 x + gate_tok c_tok + gate_lay c_lay, into Mamba-1 or Mamba-2

x is the layer's (normed) input. Two exchanges follow each other: the pools of earlier ranks, then Mamba's own. Pools of
earlier layers are of the same blocks and lie here already.

Legend: T tokens held here, D model width, W summary width, K slots, B tokens of a block, M cells (block x document held
here), p period.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..heads import Cut
from ..ops.pool import POLICIES, Cells, PoolMerge, Selection, make_notes, pool_cells, read
from ..ops.segments import Segments
from ..sequence import SequenceShard
from .mamba1 import Mamba1, Mamba1State
from .mamba2 import Mamba2, Mamba2State

if TYPE_CHECKING:
    from ..config import ModelConfig

CORES = ("mamba1", "mamba2")


@dataclass(frozen=True, kw_only=True)
class MemMambaConfig:
    """MemMamba; its core's options are those of mamba1 or mamba2."""

    core: str = "mamba1"
    """The state-space layer inside: mamba1, as published, or mamba2."""

    summary_width: int = 64
    """W: numbers of a note's summary."""

    slots: int = 50
    """K: notes of a pool."""

    replacement: str = "priority"
    """Which notes stay: priority (the largest scores) or fifo (the latest)."""

    threshold: float = 0.5
    """A token is noted if its score, between 0 and 1, exceeds this."""

    block: int = 64
    """B: tokens, counted from their document's start, that read the pool of the blocks before theirs."""

    period: int = 4
    """p: every p-th MemMamba layer also reads the pools of the p before it; 0 is never."""

    def __post_init__(self) -> None:
        if self.core not in CORES:
            raise UserError(f"memmamba.core {self.core!r} is neither {' nor '.join(CORES)}.")
        if self.replacement not in POLICIES:
            raise UserError(f"memmamba.replacement {self.replacement!r} is neither {' nor '.join(POLICIES)}.")
        for name in ("summary_width", "slots", "block"):
            if getattr(self, name) < 1:
                raise UserError(f"memmamba.{name} must be at least 1, but is {getattr(self, name)}.")
        if self.period < 0:
            raise UserError(f"memmamba.period must be at least 0 (never), but is {self.period}.")
        if not 0 <= self.threshold < 1:
            raise UserError(f"memmamba.threshold must be at least 0 and below 1, but is {self.threshold}.")


class MemMambaState(NamedTuple):
    """`pool` [2, K, W + 3], the sealed notes and those of the open block; `conv` and `S` are the core's."""

    pool: Tensor | None
    conv: Tensor | None
    S: Tensor | None


class PoolReader(nn.Module):
    """Gated attention to pools: [T, D] -> [T, D]."""

    def __init__(self, hidden_size: int, summary_width: int) -> None:
        super().__init__()
        self.query = nn.Linear(hidden_size, summary_width, bias=False)
        self.gate = nn.Linear(hidden_size, 1)
        self.out = nn.Linear(summary_width, hidden_size, bias=False)

    def reset_parameters(self) -> None:
        """torch's; the gate starts half open."""
        for linear in (self.query, self.out, self.gate):
            linear.reset_parameters()
        nn.init.zeros_(self.gate.bias)

    def forward(self, x: Tensor, pools: Tensor, cells: Cells) -> Tensor:
        """x [T, D] reads pools [M, slots, W + 3]."""
        return self.gate(x).sigmoid() * self.out(read(self.query(x), pools, cells))


def pool_shape(block: int, slots: int, width: int, segments: Segments) -> tuple[int, int, int]:
    """Shape of the pools a layer gives for the tokens held here, [M, K, W + 3], known before it runs."""
    return pool_cells(segments, block, "cpu").num_cells, slots, width


class MemMamba(nn.Module):
    """[T, D] -> [T, D]."""

    def __init__(self, hidden_size: int, config: MemMambaConfig, core: Mamba1 | Mamba2, ordinal: int = 0) -> None:
        super().__init__()
        self.config, self.core = config, core
        self.score_hidden = nn.Linear(hidden_size, max(1, hidden_size // 4))
        self.score_out = nn.Linear(self.score_hidden.out_features, 1)
        self.note = nn.Linear(hidden_size, config.summary_width, bias=False)
        self.reader = PoolReader(hidden_size, config.summary_width)
        # Layers count from 1 in "every p-th"; the first has no layer before it.
        across = config.period > 0 and ordinal > 0 and (ordinal + 1) % config.period == 0
        self.layer_reader = PoolReader(hidden_size, config.summary_width) if across else None
        self.recalls = config.period
        """How many of the latest pools a layer reads."""
        self.pool_shape = partial(pool_shape, config.block, config.slots, config.summary_width + 3)

    @classmethod
    def build(cls, model: ModelConfig, layer: int) -> MemMamba:
        if model.memmamba.core == "mamba2" and model.mamba2.state_window is not None:
            raise UserError("memmamba keeps no sliding-window state: leave mamba2.state_window out, or use mixer mamba2.")
        core = Mamba1.build(model, layer) if model.memmamba.core == "mamba1" else Mamba2.build(model, layer)
        # Only MemMamba layers have pools, so only they are counted.
        return cls(model.hidden_size, model.memmamba, core, ordinal=model.layers[:layer].count("L"))

    def reset_parameters(self) -> None:
        """Mamba's as published, torch's for what the paper does not say. Every token's score starts above one half.

        A layer that notes nothing gives its scorer no gradient and would stay so.
        """
        self.core.reset_parameters()
        for module in (self.score_hidden, self.score_out, self.note, self.reader):
            module.reset_parameters()
        nn.init.ones_(self.score_out.bias)
        if self.layer_reader is not None:
            self.layer_reader.reset_parameters()

    def forward(self, x: Tensor, shard: SequenceShard, state: MemMambaState | None = None) -> tuple[Tensor, MemMambaState]:
        y, state, _ = self.recall(x, shard, state, ())
        return y, state

    def recall(
        self, x: Tensor, shard: SequenceShard, state: MemMambaState | None, memory: Sequence[Tensor]
    ) -> tuple[Tensor, MemMambaState, Tensor]:
        """The layer, with the pools of earlier layers.

        Args:
            memory: the pools that the MemMamba layers before gave, [M, K, W + 3] each, in order.

        Returns:
            [T, D], the state, and this layer's pools [M, K, W + 3], of the tokens held here.
        """
        config = self.config
        cells = pool_cells(shard.segments, config.block, x.device)
        score = self._score(x)
        notes = make_notes(self.note(x) * score[:, None], score, shard.positions, score > config.threshold)
        selection = Selection(notes, cells, config.slots, config.replacement)
        merge = PoolMerge(config.block, config.replacement)
        before, pool = shard.prefix(merge, selection.element(), None if state is None else state.pool)
        pools = selection.visible(before)
        x = x + self.reader(x, pools, cells)
        if self.layer_reader is not None and memory:
            x = x + self.layer_reader(x, torch.cat(list(memory[-config.period :]), dim=1), cells)
        y, core_state = self._run_core(x, shard, state)
        return y, MemMambaState(pool, core_state.conv, core_state.S), pools

    def _score(self, x: Tensor) -> Tensor:
        """Importance of each token, [T, D] -> [T]. Low precision would tie scores that differ."""
        wide = torch.promote_types(torch.float32, x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(wide)
            for linear, activation in ((self.score_hidden, F.relu), (self.score_out, torch.sigmoid)):
                x = activation(F.linear(x, linear.weight.to(wide), linear.bias.to(wide)))
        return x[:, 0]

    def _run_core(self, x: Tensor, shard: SequenceShard, state: MemMambaState | None) -> tuple[Tensor, Mamba1State | Mamba2State]:
        if isinstance(self.core, Mamba1):
            return self.core(x, shard, None if state is None else Mamba1State(state.conv, state.S))
        return self.core(x, shard, None if state is None else Mamba2State(state.conv, state.S))

    def cuts(self) -> dict[str, Cut]:
        """The core's: notes and pools have no heads, and every owner of heads makes the same."""
        return {f"core.{name}": cut for name, cut in self.core.cuts().items()}

    def keep_heads(self, part: int, parts: int) -> None:
        self.core.keep_heads(part, parts)

    def flops_per_token(self, seq_length: int) -> int:
        """Forward FLOPs of one token: the core's, the weights, and two products with every slot read."""
        weights = sum(parameter.numel() for name, parameter in self.named_parameters() if not name.startswith("core."))
        pools = 1 + (self.config.period if self.layer_reader is not None else 0)
        attention = 4 * pools * self.config.slots * self.config.summary_width
        return 2 * weights + attention + self.core.flops_per_token(seq_length)
