"""JRT: linear attention that reads a document's prefix in both directions, its two-part loss, and repeated contexts.

Arora et al., "Just read twice: closing the recall gap for recurrent language models" (arXiv 2407.05483).

    paper                                       here
    M (length of the encoder's region)          prefix_length; of a document, its first min(M, length) tokens
    q, k, v;  k^e, v^e (encoder)                q, k [T, H, F], v [T, H, V] from qkv;  k_e, v_e from kv_prefix
    phi (Taylor map of Based)                   taylor_features, K = 1 + F + F (F + 1) / 2 columns; or elu + 1, K = F
    sum_{j <= i} phi(k_j)^T v_j                 ScalarDecay without decay, state [H, K, V + 1]
    sum_{j <= M} phi(k^e_j)^T v^e_j             the prefix's total, [H, K, V + 1]: one sum a document, read by all its tokens
    y_i (eq. 3)                                 both sums read by phi(q_i), divided by the same of ones (the last column)

Every token of a document reads its whole prefix, those inside the prefix too: JRT is a named exception of causality. Behind
the prefix it is causal.

On ranks: the prefix's totals are `shard.document_sum`, one all-reduce of [documents that cross ranks, H, K, V + 1] numbers;
the rest is the usual exchange. A document's prefix lies in the stream in which the document starts. A prompt shorter than M
is a prefix as it is, and what is generated after it is none; in training, a border inside a prefix is refused, since it would
change the model. In streams that continue or are continued the prefix's total is state, and travels by a second scan.

What the reference leaves open: no norm and no gate, as in Based; matrices start Xavier-uniform with gain 2 ** -2.5.

Its loss and its repeated contexts are options of the data (`data.prefix_length`, `data.repeat_context`): labels and weights
belong to whole streams, before these are spread over ranks.

Legend: T tokens held here, S segments held here, D model width, H heads, V = D / H, F feature dimension, K columns of the map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..heads import Cut, share
from ..ops.affine import accumulate_dtype
from ..ops.scalar_decay import ScalarDecay
from ..ops.segments import Documents
from ..sequence import SequenceShard
from .based import taylor_features

if TYPE_CHECKING:
    from ..config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class JRTConfig:
    """Prefix linear attention."""

    prefix_length: int = 1024
    """M: leading tokens of a document that all its tokens read."""

    feature_map: str = "taylor"
    """taylor (the second-order expansion of exp) or elu+1."""

    feature_dim: int = 16
    """F: width of a head's q and k before the feature map."""

    chunk: int = 64
    """Tokens of an inner chunk."""

    def __post_init__(self) -> None:
        if self.feature_map not in ("taylor", "elu+1"):
            raise UserError(f"feature_map {self.feature_map!r} is neither taylor nor elu+1.")
        if self.prefix_length < 0 or self.feature_dim < 1:
            raise UserError(
                f"prefix_length {self.prefix_length} cannot be negative, and feature_dim {self.feature_dim} is at least 1."
            )


class JRTState(NamedTuple):
    """`S` [H, K, V + 1], of all tokens so far; `prefix`, the same shape, of the document's prefix."""

    S: Tensor | None
    prefix: Tensor | None


class JRT(nn.Module):
    """[T, D] -> [T, D]. In training, a stream may not start inside a document's prefix."""

    def __init__(self, hidden_size: int, num_heads: int, config: JRTConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.config = num_heads, hidden_size // num_heads, config
        features = num_heads * config.feature_dim
        self.widths = features, features, hidden_size
        self.qkv = nn.Linear(hidden_size, sum(self.widths), bias=False)
        self.kv_prefix = nn.Linear(hidden_size, sum(self.widths[1:]), bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    @classmethod
    def build(cls, model: ModelConfig, layer: int) -> JRT:
        return cls(model.hidden_size, model.num_heads, model.jrt)

    def reset_parameters(self) -> None:
        """Xavier-uniform with gain 2 ** -2.5."""
        for linear in (self.qkv, self.kv_prefix, self.out):
            nn.init.xavier_uniform_(linear.weight, gain=2**-2.5)

    def features(self, x: Tensor) -> Tensor:
        """[T, H, F] -> [T, H, K]."""
        return taylor_features(x) if self.config.feature_map == "taylor" else F.elu(x) + 1

    @property
    def num_features(self) -> int:
        """K."""
        width = self.config.feature_dim
        return 1 + width + width * (width + 1) // 2 if self.config.feature_map == "taylor" else width

    def forward(self, x: Tensor, shard: SequenceShard, state: JRTState | None = None) -> tuple[Tensor, JRTState]:
        earlier = shard.documents.first_position
        if self.training and 0 < earlier < self.config.prefix_length:
            raise UserError(
                f"A stream begins at position {earlier} of a document, inside its prefix of {self.config.prefix_length} "
                "tokens; JRT reads a prefix as a whole, so take longer streams or a smaller jrt.prefix_length."
            )
        q, k, v = (tensor.unflatten(-1, (self.num_heads, -1)) for tensor in self.qkv(x).split(self.widths, dim=-1))
        k_e, v_e = (tensor.unflatten(-1, (self.num_heads, -1)) for tensor in self.kv_prefix(x).split(self.widths[1:], dim=-1))
        q, k, k_e = (self.features(tensor) for tensor in (q, k, k_e))
        v, v_e = (torch.cat([tensor, torch.ones_like(tensor[..., :1])], dim=-1) for tensor in (v, v_e))
        op = ScalarDecay(chunk=self.config.chunk)
        sums, S = shard.scan(op, (q, k, v, None), None if state is None else state.S)
        read = self.read_prefix(q, k_e, v_e, shard)
        prefix = None
        if shard.keep_state or earlier:
            inside = prefix_mask(shard, self.config.prefix_length)[:, None, None]
            carried, prefix = shard.scan(op, (q, k_e * inside, v_e, None), None if state is None else state.prefix)
            read = torch.where(_continued(shard)[:, None, None], carried, read)  # of a document that began in this stream: all
        sums = sums + read
        y = sums[..., :-1] / sums[..., -1:]
        return self.out(y.flatten(1)), JRTState(S, prefix)  # [T, H, V] -> [T, D]

    def read_prefix(self, q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard) -> Tensor:
        """`q` times the whole prefix of each token's document; [T, H, K], [T, H, K], [T, H, V + 1] -> [T, H, V + 1]."""
        wide = accumulate_dtype(v.dtype)
        segments = shard.segments
        bounds = list(zip(segments.bounds, segments.bounds[1:]))
        if not bounds:  # other ranks wait for the gradient of the sum, so the result stays connected to it
            total = shard.document_sum(torch.einsum("thk,thv->thkv", k, v).to(wide))
            return torch.einsum("thk,thkv->thv", q.to(wide), total).to(v.dtype)
        inside = prefix_lengths(shard, self.config.prefix_length)
        own = [torch.einsum("thk,thv->hkv", k[a : a + n].to(wide), v[a : a + n].to(wide)) for (a, _), n in zip(bounds, inside)]
        totals = shard.document_sum(torch.stack(own))  # [S, H, K, V + 1]
        read = [torch.einsum("thk,hkv->thv", q[a:b].to(wide), total) for (a, b), total in zip(bounds, totals)]
        return torch.cat(read).to(v.dtype)

    def cuts(self) -> dict[str, Cut]:
        features, value = (self.num_heads, self.config.feature_dim), (self.num_heads, self.head_dim)
        return {
            "qkv.weight": Cut(0, (features, features, value)),
            "kv_prefix.weight": Cut(0, (features, value)),
            "out.weight": Cut(1, (value,)),
        }

    def keep_heads(self, part: int, parts: int) -> None:
        self.num_heads, _ = share(self.num_heads, part, parts)
        features = self.num_heads * self.config.feature_dim
        self.widths = features, features, self.num_heads * self.head_dim

    def flops_per_token(self, seq_length: int) -> int:
        """Forward FLOPs of one token: both sums as recurrences, the prefix's for its share of the document."""
        weights = self.qkv.weight.numel() + self.kv_prefix.weight.numel() + self.out.weight.numel()
        product = self.num_heads * self.num_features * (self.head_dim + 1)
        inside = min(self.config.prefix_length, seq_length)
        return 2 * weights + 6 * product + 2 * product * inside // max(seq_length, 1)


def prefix_lengths(shard: SequenceShard, prefix_length: int) -> list[int]:
    """How many leading tokens of each segment lie in its document's prefix; none of a document from an earlier stream."""
    segments, earlier = shard.segments, shard.documents.first_position > 0
    lengths = []
    for start, stop, document, position in zip(
        segments.bounds, segments.bounds[1:], segments.document_of, segments.position_of
    ):
        continued = earlier and document == 0
        lengths.append(0 if continued else max(0, min(stop - start, prefix_length - position)))
    return lengths


def prefix_mask(shard: SequenceShard, prefix_length: int) -> Tensor:
    """Whether each token held here lies in its document's prefix, bool [T]."""
    return (shard.positions < prefix_length) & ~_continued(shard)


def _continued(shard: SequenceShard) -> Tensor:
    """Whether each token's document began in an earlier stream, bool [T]."""
    return (shard.document_ids == 0) & (shard.documents.first_position > 0)


class Targets(NamedTuple):
    """What a model reads, int64 [T], what it should say there, int64 [T], and how much that counts, [T]."""

    tokens: Tensor
    labels: Tensor
    weights: Tensor


def two_part_targets(
    tokens: Tensor,
    documents: Documents,
    prefix_length: int,
    mask_id: int | None,
    rate: float = 0.15,
    weight: float = 0.25,
    draws: Tensor | None = None,
    following: tuple[Tensor, Tensor] | None = None,
) -> Targets:
    """JRT's training objective as tokens, labels and weights of a whole stream, before it is spread over ranks.

    Behind the prefix, and at its last token, the label is the next token and counts 1. Inside, a share of the tokens is
    replaced by `mask_id`, the label is the token that was there, and a document's masked tokens together count
    `weight` times the tokens of its prefix: the paper's `mean(decoder) + 0.25 mean(masked)`, up to a constant, where both
    parts are as long, and the same whatever documents are packed together. All else counts nothing.

    Args:
        tokens: int64 [T].
        mask_id: None masks nothing: what is left is the decoder's part, for evaluation.
        rate: the share of masked tokens; at least one a prefix that has a token to mask.
        draws: in each prefix the tokens with the largest are masked, [T]; from the global generator if left out.
        following: labels and weights of the next token, [T] each, where the caller knows more than `tokens` says (the last
            document may go on after the stream); the next token of the same document, weight 1, if left out.
    """
    if not 0.0 < rate <= 1.0:
        raise UserError(f"The share of masked tokens must lie in (0, 1], but is {rate}.")
    if documents.first_position:
        raise UserError(f"A prefix needs its document's start, but the stream begins at position {documents.first_position}.")
    if following is None:
        ones = torch.ones(tokens.shape)
        ones[[stop - 1 for stop in documents.bounds[1:]]] = 0.0
        following = tokens.roll(-1), ones
    shown, labels, weights = tokens.clone(), following[0].clone(), torch.zeros(tokens.shape)
    draws = torch.rand(tokens.shape) if draws is None else draws
    for start, stop in zip(documents.bounds, documents.bounds[1:]):
        inside = min(prefix_length, stop - start)
        speaks = max(start + inside - 1, start) if inside < stop - start else stop  # from here on the next token is asked for
        weights[speaks:stop] = following[1][speaks:stop]
        if speaks > start and mask_id is not None:
            count = max(1, round(rate * (speaks - start)))
            masked = start + draws[start:speaks].topk(count).indices
            shown[masked], labels[masked] = mask_id, tokens[masked]
            weights[masked] = weight * inside / count
    return Targets(shown, labels, weights)


def repeat_context(tokens: Tensor, context: int, times: int = 2) -> Targets:
    """JRT-Prompt: one document with its context, its first `context` tokens, said `times` times before the rest.

    The next token counts 1 where it is said for the first time, 0 in the repetitions (they would teach copying) and at the
    end, where there is none.

    Args:
        tokens: of one document, int64 [T].

    Returns:
        Each [T + (times - 1) context].
    """
    if not 0 <= context <= len(tokens) or times < 1:
        raise UserError(f"Cannot repeat the first {context} of {len(tokens)} tokens {times} times.")
    head, rest = tokens[:context], tokens[context:]
    repeated = torch.cat([head] * times + [rest])
    first = torch.cat([torch.ones(context), torch.zeros((times - 1) * context), torch.ones(len(rest))])  # said for once
    return Targets(repeated, repeated.roll(-1), torch.cat([first[1:], first.new_zeros(min(1, len(first)))]))
