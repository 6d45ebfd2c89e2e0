"""LongVQ: causal softmax attention to vector-quantised keys, whose memory is a fixed number of codes.

Liu et al., "LongVQ: Long Sequence Modeling with Vector Quantization on Structured Memory" (arXiv 2404.11163), and the
linear-time attention to quantised keys of Lingle, "Transformer-VQ" (arXiv 2309.16354), on which it rests.

    paper                                          here
    codebook C, s codes                            codebook [H, N, K], its rows normalised like keys
    z_j = argmin |k_j - C_z|, k^_j = C_z           codes: of the largest product, since all rows are as long
    o_i = sum_{j<=i} softmax(q_i . k^_j) v_j       keys of a code share their weight, so with sums over the tokens of each code,
        = sum_z w_iz V_z / sum_z w_iz n_z              w_iz = exp(q_i . C_z - max_z), V_z of values, n_z of ones:
    V_z, n_z up to token i                         ScalarDecay without decay, state [H, N, V + 1], keys one-hot

So the state is additive (its map is the identity) and attention is exact softmax attention to the quantised keys, in linear
time, on any number of ranks.

What we chose. Queries, keys and codes are divided by their root mean square and the product by sqrt(K), so that no exponent
leaves [-2 sqrt(K), 0] and a code that was never used cannot underflow the denominator. Gradients: queries and codes get that
of the weights w; the one-hot choice passes straight through to softmax(sharpness k . C / sqrt(K)), which trains keys and codes
to be chosen by the values they should be summed with (the papers train keys within a local window and by a commitment loss; a
window is left to the pattern's softmax layers, and there is no loss besides the model's). With `ema_rate` the codebook is, as
published, no parameter but a moving average: after each optimizer step a code moves towards the mean of the keys that chose it
in that step, over all its streams (`after_step`). What was chosen is counted in the *backward*, which runs once a micro-batch,
while a forward may run twice (recomputation). LongVQ's structured memory before the quantisation (an EMA or state-space layer)
is a layer of the pattern here, not a part of this one. Output gate and initialisation (Xavier-uniform, gain 2 ** -2.5) are
those of our linear attention; codes start as unit normals.

Legend: T tokens held here, D model width, H heads, K = V = D / H, N codes of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..heads import Cut, share
from ..ops.affine import accumulate_dtype
from ..ops.scalar_decay import ScalarDecay
from ..sequence import SequenceShard

if TYPE_CHECKING:
    from ..config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class LongVQConfig:
    """Attention to vector-quantised keys."""

    num_codes: int = 128
    """N: codes of a head; the state is N (V + 1) numbers a head."""

    sharpness: float = 4.0
    """Of the soft choice of a code whose gradient stands in for the hard one's."""

    ema_rate: float = 0.0
    """How far a code moves, in a step, to the mean of its keys (0.01 is usual); 0: codes are parameters, learnt by gradients."""

    chunk: int = 64
    """Tokens of an inner chunk."""

    def __post_init__(self) -> None:
        if self.num_codes < 1 or self.sharpness <= 0:
            raise UserError(f"num_codes {self.num_codes} is at least 1, and sharpness {self.sharpness} must be positive.")
        if not 0 <= self.ema_rate <= 1:
            raise UserError(f"longvq.ema_rate must lie between 0 (codes learn by gradients) and 1, but is {self.ema_rate}.")


class LongVQState(NamedTuple):
    """[H, N, V + 1]: of each code, the values of its tokens summed, and how many they are."""

    S: Tensor | None


class _Counted(torch.autograd.Function):
    """The identity; its backward tells the layer what the forward's tokens chose."""

    @staticmethod
    def forward(ctx: Any, o: Tensor, chosen: Tensor, layer: LongVQ) -> Tensor:
        ctx.chosen, ctx.layer = chosen, layer
        return o.view_as(o)

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor, None, None]:
        before = ctx.layer.observed()
        assert before is not None
        ctx.layer.chosen = before + ctx.chosen
        return do, None, None


class LongVQ(nn.Module):
    """[T, D] -> [T, D]."""

    codebook: Tensor

    def __init__(self, hidden_size: int, num_heads: int, config: LongVQConfig, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.config, self.norm_eps = num_heads, hidden_size // num_heads, config, norm_eps
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.gate = nn.Linear(hidden_size, hidden_size, bias=False)
        codes = torch.empty(num_heads, config.num_codes, self.head_dim)
        if config.ema_rate:
            self.register_buffer("codebook", codes)
        else:
            self.codebook = nn.Parameter(codes)
            self.codebook.no_weight_decay = True  # type: ignore[attr-defined]
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.chosen: Tensor | None = None
        """What the backwards since the last step counted: of each code the sum of its keys and their number, [H, N, K + 1]."""

    @classmethod
    def build(cls, model: ModelConfig, layer: int) -> LongVQ:
        return cls(model.hidden_size, model.num_heads, model.longvq, model.norm_eps)

    def reset_parameters(self) -> None:
        """Matrices Xavier-uniform with gain 2 ** -2.5, codes N(0, 1)."""
        for linear in (self.qkv, self.gate, self.out):
            nn.init.xavier_uniform_(linear.weight, gain=2**-2.5)
        nn.init.normal_(self.codebook)

    def normalised(self, x: Tensor) -> Tensor:
        """[..., K] with a root mean square of one, in at least float32."""
        x = x.to(accumulate_dtype(x.dtype))
        return F.rms_norm(x, x.shape[-1:], eps=self.norm_eps)

    def scores(self, x: Tensor) -> Tensor:
        """Products with the codes, [T, H, K] -> [T, H, N]; within sqrt(K) of 0."""
        x = self.normalised(x)
        codes = self.normalised(self.codebook).to(x.dtype)
        return torch.einsum("thk,hnk->thn", x, codes) * self.head_dim**-0.5

    def choose(self, k: Tensor) -> Tensor:
        """One-hot codes of keys, [T, H, K] -> [T, H, N], with the gradient of a soft choice."""
        scores = self.scores(k)
        soft = (self.config.sharpness * scores).softmax(-1)
        hard = F.one_hot(scores.argmax(-1), self.config.num_codes).to(scores.dtype)
        return hard + (soft - soft.detach())

    def forward(self, x: Tensor, shard: SequenceShard, state: LongVQState | None = None) -> tuple[Tensor, LongVQState]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(1)  # [T, 3 D] -> [T, H, K] each
        scores = self.scores(q)
        weights = (scores - scores.amax(-1, keepdim=True).detach()).exp()
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1).to(weights.dtype)  # the last column counts
        op = ScalarDecay(chunk=self.config.chunk)
        one_hot = self.choose(k)
        sums, S = shard.scan(op, (weights, one_hot, v, None), None if state is None else state.S)
        o = (sums[..., :-1] / sums[..., -1:]).to(x.dtype).flatten(1)  # [T, H, V] -> [T, D]
        if self.config.ema_rate and self.training and torch.is_grad_enabled():
            o = _Counted.apply(o, self.count(k.detach(), one_hot.detach()), self)
        return self.out(o * F.silu(self.gate(x))), LongVQState(S)

    def count(self, k: Tensor, one_hot: Tensor) -> Tensor:
        """Of each code the sum of its keys, and how many they are: [T, H, K], [T, H, N] -> [H, N, K + 1]."""
        with torch.autocast(k.device.type, enabled=False):  # bfloat16 counts to 256
            k = self.normalised(k)
            rows = torch.cat([k, torch.ones_like(k[..., :1])], dim=-1)
            return torch.einsum("thn,thk->hnk", one_hot.to(rows.dtype), rows)

    def observed(self) -> Tensor | None:
        """What `after_step` wants summed over all streams of a step, [H, N, K + 1]; None if codes learn by gradients."""
        if not self.config.ema_rate:
            return None
        if self.chosen is None:
            wide = accumulate_dtype(self.codebook.dtype)
            return self.codebook.new_zeros(*self.codebook.shape[:2], self.head_dim + 1, dtype=wide)
        return self.chosen

    @torch.no_grad()
    def after_step(self, observed: Tensor) -> None:
        """Move each code that was chosen to the mean of its keys, by `ema_rate` of the way; [H, N, K + 1], of all streams."""
        self.chosen = None
        counts, codes = observed[..., -1:], self.normalised(self.codebook)
        moved = codes.lerp((observed[..., :-1] / counts.clamp_min(1)).to(codes.dtype), self.config.ema_rate)
        self.codebook.copy_(torch.where(counts > 0, moved, codes))

    def cuts(self) -> dict[str, Cut]:
        heads = (self.num_heads, self.head_dim)
        return {
            "qkv.weight": Cut(0, (heads, heads, heads)),
            "gate.weight": Cut(0, (heads,)),
            "codebook": Cut(0, ((self.num_heads, 1),)),
            "out.weight": Cut(1, (heads,)),
        }

    def keep_heads(self, part: int, parts: int) -> None:
        self.num_heads, _ = share(self.num_heads, part, parts)

    def flops_per_token(self, seq_length: int) -> int:
        """Forward FLOPs of one token, the recurrence in its recurrent form: products with codes, add a value, read-out."""
        weights = sum(linear.weight.numel() for linear in (self.qkv, self.gate, self.out))
        codes = self.num_heads * self.config.num_codes
        return 2 * weights + 4 * codes * self.head_dim + 2 * codes * (self.head_dim + 1) + self.num_heads * self.head_dim
