"""Token mixers that look both ways, for encoders. They have no state, so a stream cannot be continued.

Three ways to see a whole document: softmax attention (Vaswani et al., arXiv 1706.03762; the engine of the shard brings the
other ranks' keys), linear attention (LASP-2, arXiv 2502.07563, algorithm 1: without a mask every token reads the same
total, so one total takes the place of the prefix), and Linformer (Wang et al., arXiv 2006.04768), whose keys and values are
projected along the sequence to a fixed length. In the last two a rank projects its own tokens and the results are
summed over the document: no term grows with its length on any rank, which is the Linformer variant of Ring
Self-Attention (arXiv 2105.13120, section 3.3). The sums are `shard.document_sum`, so both run on every layout.

    paper            here
    E, F             key_projection, value_projection, [positions, R] each
    k (Linformer)    R, projected tokens
    M = K^T V        the total, [H, K, V]

Legend: T tokens held here, S segments held here, D model width, H heads, K head width, R projected tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError
from .heads import Cut, share
from .norm import RMSNorm
from .ops.attention import Mask, Piece, attention
from .ops.rope import rope
from .sequence import SequenceShard


class BidirectionalMixer(nn.Module):
    """Projections to heads and back, [T, D] -> [T, D]; subclasses mix."""

    def __init__(self, hidden_size: int, num_heads: int, initializer_range: float = 0.02) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.initializer_range = num_heads, hidden_size // num_heads, initializer_range
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    def reset_parameters(self) -> None:
        """N(0, initializer_range), as BERT."""
        for linear in (self.qkv, self.out):
            nn.init.normal_(linear.weight, std=self.initializer_range)

    def forward(self, x: Tensor, shard: SequenceShard) -> Tensor:
        if shard.keep_state or shard.documents.first_position:
            raise UserError(
                f"A bidirectional layer reads whole documents, so a stream cannot go on or continue one at position "
                f"{shard.documents.first_position}; cut streams at document bounds."
            )
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(1)  # [T, 3 D] -> [T, H, K] each
        return self.out(self.mix(q, k, v, shard).flatten(1))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard) -> Tensor:
        """[T, H, K] each -> [T, H, K]."""
        raise NotImplementedError

    def cuts(self) -> dict[str, Cut]:
        heads = (self.num_heads, self.head_dim)
        return {"qkv.weight": Cut(0, (heads, heads, heads)), "out.weight": Cut(1, (heads,))}

    def keep_heads(self, part: int, parts: int) -> None:
        self.num_heads, _ = share(self.num_heads, part, parts)


class BidirectionalAttention(BidirectionalMixer):
    """Softmax attention with rotary positions, no causal mask."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard) -> Tensor:
        q, k = rope(q, shard.positions), rope(k, shard.positions)
        return shard.attend(q, k, v, Mask(causal=False))[0]


class BidirectionalLinearAttention(BidirectionalMixer):
    """Linear attention to the whole document, `elu + 1` features turned by their positions, an RMSNorm per head."""

    def __init__(self, hidden_size: int, num_heads: int, initializer_range: float = 0.02) -> None:
        super().__init__(hidden_size, num_heads, initializer_range)
        self.norm = RMSNorm(self.head_dim, eps=1e-5)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.norm.weight)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard) -> Tensor:
        q, k = (rope(F.elu(x) + 1, shard.positions) for x in (q, k))
        bounds = shard.segments.bounds
        total = shard.document_sum(_segment_sums("thk,thv->hkv", k, v, bounds))  # [S, H, K, V]
        q = q.to(total.dtype)
        read = [torch.einsum("thk,hkv->thv", q[a:b], own) for a, b, own in zip(bounds, bounds[1:], total)]
        o = torch.cat(read) if read else torch.einsum("thk,thkv->thv", q, total)
        return self.norm(o.to(v.dtype))


class LinformerAttention(BidirectionalMixer):
    """Softmax attention to R projected tokens of the document.

    Args:
        max_positions: rows of the projections, the longest document.
        projected: R.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, max_positions: int, projected: int, initializer_range: float = 0.02
    ) -> None:
        super().__init__(hidden_size, num_heads, initializer_range)
        self.key_projection = nn.Parameter(torch.empty(max_positions, projected))
        self.value_projection = nn.Parameter(torch.empty(max_positions, projected))

    def reset_parameters(self) -> None:
        """As the others; projections N(0, 1 / R), the paper's Johnson-Lindenstrauss scale."""
        super().reset_parameters()
        for projection in (self.key_projection, self.value_projection):
            nn.init.normal_(projection, std=projection.shape[1] ** -0.5)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard) -> Tensor:
        rows, documents = self.key_projection.shape[0], shard.documents.bounds
        longest = max((b - a for a, b in zip(documents, documents[1:])), default=0)
        if longest > rows:
            raise UserError(f"A document of {longest} tokens is longer than max_positions {rows}; raise it or cut documents.")
        q, k = rope(q, shard.positions), rope(k, shard.positions)  # the paper adds positions to the embedding instead
        e, f = self.key_projection[shard.positions], self.value_projection[shard.positions]  # [T, R] each
        bounds = shard.segments.bounds
        projected = [_segment_sums("tr,thk->rhk", weights, x, bounds) for weights, x in ((e, k), (f, v))]
        both = shard.document_sum(torch.cat(projected, dim=-1))  # [S, R, H, 2 K]
        keys, values = both.flatten(0, 1).to(q.dtype).split(self.head_dim, dim=2)
        count = self.key_projection.shape[1]
        pieces = [
            Piece(a, b, s * count, (s + 1) * count, causal=False) for s, (a, b) in enumerate(zip(bounds, bounds[1:]))
        ]
        return attention(q, keys, values, pieces, self.head_dim**-0.5)[0]


def _segment_sums(product: str, left: Tensor, right: Tensor, bounds: Sequence[int]) -> Tensor:
    """A sum of products over the tokens t of each segment, in at least float32: `..t.., ..t.. -> [S, ...]`."""
    wide = torch.promote_types(torch.float32, right.dtype)
    left, right = left.to(wide), right.to(wide)
    if len(bounds) == 1:  # no token is no segment, but the result stays connected: other ranks wait for its gradient
        return torch.einsum(product.replace("->", "->t"), left, right)
    return torch.stack([torch.einsum(product, left[a:b], right[a:b]) for a, b in zip(bounds, bounds[1:])])
