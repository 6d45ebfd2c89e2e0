"""MoM: a mixture of memories. Each token is written to, and read from, a few of M memories, and one that all share.

Du et al., "MoM: Linear Sequence Modeling with Mixture-of-Memories" (arXiv 2502.13685), section 3; the layer as released in
flash-linear-attention, without its two faults (below).

    paper                                                  here
    scores: top-k of softmax(W_g x_t), divided by their sum     choose, in float32 at least: scores [T, k], chosen [T, k]
    k_t^m = W_k^m x_t, v_t^m = W_v^m x_t                   k, v, of each memory, for the rows routed to it, [R, H, K], [R, H, V]
    q_t = W_q x_t                                          q, one projection for all memories
    M_t^m = update(M_t-1^m; k_t^m, v_t^m) if m is chosen   Routed(rule), state [E H, K, V]; a memory not chosen is untouched: it
                                                           does not decay either
    shared memory                                          memory M, the last: every token, weight 1, projections of its own
    M~_t = sum_m g_t^m M_t^m, o_t = q_t M~_t               o_t = sum_m g_t^m (q_t M_t^m): reading is linear, so mixing what was
                                                           read is mixing memories
    RMSNorm per head, SiLU gate, W_o                       norm, gate, out

The update is a rule of `RULES`: gated_delta (published; equations as in `gated_deltanet.py`), delta, scalar_decay
(`S_t = exp(log_decay_t) S_t-1 + k_t^T v_t`) or linear (no decay). q and k are normalised in all of them. A_log, dt_bias and
the convolution's weights are shared by all memories; with single_kv_proj (as released) so are W_k, W_v, W_beta and W_a, the
shared memory's included.

Short convolution (SiLU, no bias), by name:
    memory     as published: over q, k and v inside each memory's own stream of each document, whose last tokens may lie
               several ranks back: two exchanges one after the other, tails then states.
    sequence   cheaper: over x before it is projected to q, k and v, once for all memories; one halo. Another model.

Faults of the released layer, which this one does not share: its sort is not stable, so that a memory's tokens swap places in
time; and in training its convolution runs on from one memory's stream into the next one's, which starts earlier in time.
Capacity (dropping a memory's oldest tokens) depends on the length of the sequence, and is left out.

The balance loss is that of `moe.py` over the M routed memories: per document, 1 if all are used alike. The released loss
counts each of the k choices in full (k times this one) and pools all layers; `balance_weight` 0.02 is its 0.01 at k = 2.

Legend: T tokens held here, D model width, M memories to choose from, E = M + 1 with the shared one, k memories of a token,
R rows (a token has one for each of its memories, the shared one included), H heads, K key width, V value width, W taps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..balance import routing_means
from ..errors import UserError
from ..heads import Cut, share
from ..norm import RMSNorm
from ..ops.convolution import causal_conv
from ..ops.delta_rule import DeltaRule, delta_inputs
from ..ops.recurrence import Inputs, Recurrence
from ..ops.routing import Buckets, Routed, Tail, TailMonoid, choose, tails
from ..ops.scalar_decay import ScalarDecay
from ..sequence import SequenceShard
from .deltanet import l2_norm
from .gated_deltanet import init_steps_

if TYPE_CHECKING:
    from ..config import ModelConfig


class Rule(NamedTuple):
    """Whether an update corrects what it overwrites (beta), and whether memory decays."""

    corrects: bool
    decays: bool


RULES = {
    "gated_delta": Rule(corrects=True, decays=True),
    "delta": Rule(corrects=True, decays=False),
    "scalar_decay": Rule(corrects=False, decays=True),
    "linear": Rule(corrects=False, decays=False),
}
CONVOLUTIONS = ("memory", "sequence")


@dataclass(frozen=True, kw_only=True)
class MoMConfig:
    """Mixture of memories."""

    num_memories: int = 4
    """M, memories to choose from."""

    top_k: int = 2
    """Memories each token is routed to, besides the shared one."""

    shared_memory: bool = True
    """A further memory of all tokens."""

    single_kv_proj: bool = False
    """One projection to k, v and gates for all memories instead of one each."""

    rule: str = "gated_delta"
    """The update inside a memory: gated_delta, delta, scalar_decay or linear."""

    head_dim: int | None = None
    """K, width of a key head; hidden_size / num_heads if left out."""

    expand_v: int = 1
    """V / K."""

    conv_width: int = 4
    """Taps of the short convolution."""

    convolution: str = "memory"
    """Over what it runs: memory (each memory's own stream, as published) or sequence (before routing; cheaper)."""

    balance_weight: float = 0.02
    """Of the balance loss, per layer; 0 is none."""

    dt_min: float = 1e-3
    """Smallest initial step."""

    dt_max: float = 0.1
    """Largest initial step."""

    chunk: int = 64
    """Tokens of an inner chunk, a power of two."""

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_memories:
            raise UserError(f"mom.top_k {self.top_k} must lie between 1 and mom.num_memories {self.num_memories}.")
        if self.rule not in RULES:
            raise UserError(f"mom.rule {self.rule!r} is none of {', '.join(RULES)}.")
        if self.convolution not in CONVOLUTIONS:
            raise UserError(f"mom.convolution {self.convolution!r} is none of {', '.join(CONVOLUTIONS)}.")
        if self.balance_weight < 0:
            raise UserError(f"mom.balance_weight cannot be negative, but is {self.balance_weight}.")
        if self.chunk < 1 or self.chunk & (self.chunk - 1):
            raise UserError(f"mom.chunk must be a power of two, but is {self.chunk}; try 64.")


class MoMState(NamedTuple):
    """`conv`, the convolution's last inputs, [E, W - 1, 2 H K + H V] (of each memory), or [W - 1, D] with convolution
    "sequence"; `S` [E H, K, V]."""

    conv: Tensor | None
    S: Tensor | None


class MoM(nn.Module):
    """[T, D] -> [T, D]."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        config: MoMConfig,
        norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__()
        self.config, self.num_heads, self.initializer_range = config, num_heads, initializer_range
        self.rule = RULES[config.rule]
        self.width_k = config.head_dim or hidden_size // num_heads
        self.width_v = config.expand_v * self.width_k
        self.num_memories = config.num_memories + config.shared_memory  # E
        self.widths = (num_heads * self.width_k, num_heads * self.width_k, num_heads * self.width_v)  # q | k | v
        projections = 1 if config.single_kv_proj else self.num_memories

        def per_memory(width: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(projections, width, hidden_size))

        self.router = nn.Parameter(torch.empty(config.num_memories, hidden_size))
        self.q = nn.Linear(hidden_size, self.widths[0], bias=False)
        self.k, self.v = per_memory(self.widths[1]), per_memory(self.widths[2])
        self.beta = per_memory(num_heads) if self.rule.corrects else None
        self.decay = per_memory(num_heads) if self.rule.decays else None
        self.A_log = nn.Parameter(torch.empty(num_heads)) if self.rule.decays else None
        self.dt_bias = nn.Parameter(torch.empty(num_heads)) if self.rule.decays else None
        channels = sum(self.widths) if config.convolution == "memory" else hidden_size
        self.conv_weight = nn.Parameter(torch.empty(channels, config.conv_width))
        self.gate = nn.Linear(hidden_size, self.widths[2], bias=False)
        self.norm = RMSNorm(self.width_v, eps=norm_eps)
        self.out = nn.Linear(self.widths[2], hidden_size, bias=False)
        for parameter in (self.A_log, self.dt_bias, self.norm.weight):
            if parameter is not None:
                parameter.no_weight_decay = True  # type: ignore[attr-defined]

    @classmethod
    def build(cls, model: ModelConfig, layer: int) -> MoM:
        return cls(model.hidden_size, model.num_heads, model.mom, model.norm_eps, model.initializer_range)

    def reset_parameters(self) -> None:
        """As released: weights and convolutions N(0, initializer_range); A ~ U(0, 16), kept off 0, and dt log-uniform."""
        weights = (self.router, self.q.weight, self.k, self.v, self.beta, self.decay, self.conv_weight)
        for weight in (*weights, self.gate.weight, self.out.weight):
            if weight is not None:
                nn.init.normal_(weight, std=self.initializer_range)
        nn.init.ones_(self.norm.weight)
        if self.A_log is not None and self.dt_bias is not None:
            with torch.no_grad():
                self.A_log.uniform_(1e-2, 16).log_()
                init_steps_(self.dt_bias, self.config.dt_min, self.config.dt_max)

    def probabilities(self, x: Tensor) -> Tensor:
        """The router's softmax, [T, D] -> [T, M], in float32 at least."""
        wide = torch.promote_types(torch.float32, x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(wide), self.router.to(wide)).softmax(-1)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The weight and the memory of each row of a token, [T, k] each; the shared memory comes last."""
        scores, chosen = choose(self.probabilities(x), self.config.top_k)
        if self.config.shared_memory:
            scores = torch.cat([scores, torch.ones_like(scores[:, :1])], dim=1)
            chosen = torch.cat([chosen, torch.full_like(chosen[:, :1], self.config.num_memories)], dim=1)
        return scores, chosen

    def forward(self, x: Tensor, shard: SequenceShard, state: MoMState | None = None) -> tuple[Tensor, MoMState]:
        scores, chosen = self.route(x)
        buckets = Buckets(chosen, self.num_memories, shard.segments)
        before = None if state is None else state.conv
        inside = self.config.convolution == "memory"
        y, conv = x, None
        if not inside:
            context, conv = shard.halo(x, self.config.conv_width - 1, before)
            y = causal_conv(x, context, self.conv_weight, None, shard.segments, activation="silu")
        q = self.q(y)[buckets.tokens]
        rows = torch.cat([q, self._project(y, self.k, buckets), self._project(y, self.v, buckets)], dim=-1)  # [R, 2 H K + H V]
        if inside:
            rows, conv = self._convolve_memories(rows, buckets, shard, before)
        op, inputs = self._update(x, rows, buckets)
        o, S = shard.scan(Routed(op, buckets), inputs, None if state is None else state.S)
        o = self.norm(buckets.combine(o, scores))  # [R, H, V] -> [T, H, V]
        return self.out((o * F.silu(self.gate(x)).view_as(o)).flatten(1)), MoMState(conv, S)

    def _project(self, x: Tensor, weight: Tensor, buckets: Buckets) -> Tensor:
        """Each row through its memory's weight: x [T, D], weight [E or 1, n, D] -> [R, n]."""
        if len(weight) == 1:
            return F.linear(x, weight[0].to(x.dtype))[buckets.tokens]
        weights = weight.to(x.dtype).unbind()
        rows = x[buckets.tokens].split(buckets.sizes)
        return torch.cat([F.linear(own, weights[bucket % self.num_memories]) for bucket, own in enumerate(rows)])

    def _convolve_memories(
        self, rows: Tensor, buckets: Buckets, shard: SequenceShard, before: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The convolution inside each memory's stream, [R, n] -> [R, n], and the tails [E, W - 1, n] if they are kept."""
        width = self.config.conv_width - 1
        own = tails(rows, buckets, width)
        earlier = None if before is None else Tail(before, own.counts.new_full(own.counts.shape[1:], width))
        context, after = shard.prefix(TailMonoid(), own, earlier)
        flat = context.rows.flatten(0, 1)  # [N, E, W - 1, n] -> [N E, W - 1, n]
        rows = causal_conv(rows, flat, self.conv_weight, None, buckets.segments, activation="silu")
        return rows, None if after is None else after.rows

    def _update(self, x: Tensor, rows: Tensor, buckets: Buckets) -> tuple[Recurrence, Inputs]:
        """The rule, and its inputs from the rows of q, k and v, [R, 2 H K + H V]."""
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in rows.split(self.widths, dim=-1))
        q, k = l2_norm(q) * self.width_k**-0.5, l2_norm(k)
        log_decay = None
        if self.decay is not None and self.A_log is not None and self.dt_bias is not None:
            step = self._project(x, self.decay, buckets).to(self.dt_bias.dtype)
            log_decay = -self.A_log.exp() * F.softplus(step + self.dt_bias)  # [R, H]
        if self.beta is None:
            return ScalarDecay(chunk=self.config.chunk), (q, k, v, log_decay)
        beta = self._project(x, self.beta, buckets).sigmoid()
        return DeltaRule(self.config.chunk), delta_inputs(q, k, v, beta, log_decay)

    def auxiliary(self, x: Tensor, shard: SequenceShard) -> Tensor | None:
        """The weighted balance loss of each document of the stream, replicated; None if it has no weight.

        Args:
            x: what `forward` takes, [T, D].

        Returns:
            [documents of the stream].
        """
        config = self.config
        if not config.balance_weight:
            return None
        probabilities = self.probabilities(x)
        _, chosen = choose(probabilities, config.top_k)
        f, P = routing_means(probabilities, chosen, shard)
        return config.balance_weight * config.num_memories / config.top_k * (f.detach() * P).sum(1)

    def cuts(self) -> dict[str, Cut]:
        """Heads of every memory. The router is shared: all owners of heads route alike."""
        each, key, value = (self.num_heads, 1), (self.num_heads, self.width_k), (self.num_heads, self.width_v)
        cuts = {
            "q.weight": Cut(0, (key,)),
            "k": Cut(1, (key,)),
            "v": Cut(1, (value,)),
            "gate.weight": Cut(0, (value,)),
            "out.weight": Cut(1, (value,)),
        }
        if self.rule.corrects:
            cuts["beta"] = Cut(1, (each,))
        if self.rule.decays:
            cuts.update(decay=Cut(1, (each,)), A_log=Cut(0, (each,)), dt_bias=Cut(0, (each,)))
        if self.config.convolution == "memory":
            cuts["conv_weight"] = Cut(0, (key, key, value))
        return cuts

    def keep_heads(self, part: int, parts: int) -> None:
        self.num_heads, _ = share(self.num_heads, part, parts)
        key = self.num_heads * self.width_k
        self.widths = key, key, self.num_heads * self.width_v

    def flops_per_token(self, seq_length: int) -> int:
        """Forward FLOPs of one token, each of its memories' recurrence in its recurrent form."""
        config = self.config
        rows = config.top_k + config.shared_memory
        per_row = [weight[0].numel() for weight in (self.k, self.v, self.beta, self.decay) if weight is not None]
        shared = [self.router, self.q.weight, self.gate.weight, self.out.weight]
        weights = sum(weight.numel() for weight in shared) + rows * sum(per_row)
        convolved = self.conv_weight.numel() * (rows if config.convolution == "memory" else 1)
        recurrence = (7 if self.rule.corrects else 5) * self.num_heads * self.width_k * self.width_v
        return 2 * (weights + convolved) + rows * recurrence
