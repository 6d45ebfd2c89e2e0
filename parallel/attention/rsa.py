"""RSA: Ring Self-Attention as published, with the whole strip of scores.

Li et al. (arXiv 2105.13120), section 3.2. Keys go round the ring once, which completes a rank's strip of scores
[H, T, L]; a row softmax makes it probabilities; values go round once more. The backward sends values round again (for the
strip's cotangent) and keys (for the queries'), and sums the gradients of keys and values, each of full length L, by one
all-reduce each, of which every rank keeps its slice. The strip is kept for the backward, as published; after activation
checkpointing it is rebuilt from the log-sum-exp while the keys go round.

The paper is about bidirectional attention; causal masks hide scores but spare no message. Every layout, with or without
packed documents; its paper's experiments train on `contiguous_per_document`.

Received per rank and layer, with N tokens, n_p of them here: forward (N - n_p) Hkv (K + V) elements of the input dtype;
backward the same, plus 2 (P - 1) / P N Hkv (K + V) of the accumulation dtype. An all-reduce is counted as the ring that
does it: a reduce-scatter and an all-gather, each P - 1 messages of 1 / P of the payload. On even ranks with Hkv K = Hkv V =
D these are the paper's 2 (P - 1) n D forward and 6 (P - 1) n D backward.

The Linformer variant (section 3.3), in which no length is whole anywhere, needs no engine: see
`LinformerAttention` in `longhaul.models.bidirectional`.

Legend: T tokens held here, L tokens of the stream, n tokens of a block, B tokens of the incoming state, P ranks, H heads,
Hkv key heads, G = H / Hkv, K, V widths.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from longhaul.models.ops import recompute
from longhaul.models.ops.attention import Mask
from longhaul.parallel.comm import Comm
from longhaul.parallel.shard import RankShard

from .base import Call, Engine, Gradients, Past, Shape, accumulation, cached, holdings
from .pieces import coordinates, past_runs, seen
from .rotate import Rotation


class RingSelfAttention(Engine):
    """K ring, then V ring; the strip of scores is held whole. Bidirectional and causal, no window."""

    name = "rsa"
    serves_windows = False

    def call(self, shard: RankShard, shape: Shape, mask: Mask, scale: float, before: int, dtype: torch.dtype) -> Call:
        tokens = [held.num_tokens for held in holdings(shard)]
        hidden = cached(shard, (self.name, mask, before), lambda: self._hidden(shard, mask, before))
        return _Call(self.comm, tokens, hidden, scale, before)

    def _hidden(self, shard: RankShard, mask: Mask, before: int) -> Tensor:
        """Scores that the mask hides, bool [T, B + L], keys in rank order."""
        every = [coordinates(held.runs, shard.device) for held in holdings(shard)]
        keys = [coordinates(past_runs(before), shard.device), *every]
        joined = torch.cat([documents for documents, _ in keys]), torch.cat([tokens for _, tokens in keys])
        return ~seen(every[self.comm.rank], joined, mask)


class _Call(Call):
    def __init__(self, comm: Comm, tokens: list[int], hidden: Tensor, scale: float, before: int) -> None:
        self.comm, self.tokens, self.hidden, self.scale, self.before = comm, tokens, hidden, scale, before
        self.starts = [before + sum(tokens[:rank]) for rank in range(comm.size)]
        self.strip: Tensor | None = None

    def _columns(self, rank: int) -> slice:
        return slice(self.starts[rank], self.starts[rank] + self.tokens[rank])

    def _round(self, own: Tensor, past: Tensor | None, label: str) -> Iterator[tuple[slice, Tensor]]:
        """(columns of the strip, block [n, Hkv, W]) of the incoming state, of this rank, then of every other."""

        def empty(rank: int) -> tuple[Tensor, ...]:
            return (own.new_empty(self.tokens[rank], *own.shape[1:]),)

        reach = [self.comm.size - 1 if count else 0 for count in self.tokens]
        rotation = Rotation(self.comm, (own,), empty, reach, label)
        if past is not None:
            yield slice(0, self.before), past
        yield self._columns(self.comm.rank), own
        for _, source, block in rotation:
            if block is not None:
                yield self._columns(source), block[0]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, past: Past) -> tuple[Tensor, Tensor]:
        wide, key_heads = accumulation(q.dtype), k.shape[1]
        queries = _by_key_head(q.to(wide), key_heads)  # [Hkv, G, T, K]
        strip = queries.new_empty(*queries.shape[:3], self.before + sum(self.tokens))  # [Hkv, G, T, B + L]
        for columns, block in self._round(k, None if past is None else past[0], "kv forward"):
            strip[..., columns] = self._scores(queries, block)
        strip.masked_fill_(self.hidden, float("-inf"))
        lse = strip.logsumexp(-1)
        strip.sub_(lse[..., None]).exp_()
        out = queries.new_zeros(*queries.shape[:3], v.shape[2])
        for columns, block in self._round(v, None if past is None else past[1], "kv forward"):
            out += strip[..., columns] @ _keys_first(block, wide)
        self.strip = strip
        return _by_token(out), lse

    def _scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """[Hkv, G, T, K] x [n, Hkv, K] -> [Hkv, G, T, n]."""
        return (queries @ _keys_first(keys, queries.dtype).mT).mul_(self.scale)

    def residuals(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        strip, self.strip = self.strip, None
        return (q, k, v, out, lse) if strip is None or recompute.taped() else (q, k, v, out, lse, strip)

    def backward(self, dout: Tensor, residuals: tuple[Tensor, ...], past: Past) -> Gradients:
        q, k, v, out, lse, *kept = residuals
        wide, key_heads = accumulation(q.dtype), k.shape[1]
        queries, douts = _by_key_head(q.to(wide), key_heads), _by_key_head(dout.to(wide), key_heads)
        delta = (douts * _by_key_head(out.to(wide), key_heads)).sum(-1, keepdim=True)
        dstrip = queries.new_empty(*queries.shape[:3], self.before + sum(self.tokens))
        for columns, block in self._round(v, None if past is None else past[1], "kv backward"):
            dstrip[..., columns] = douts @ _keys_first(block, wide).mT
        dqueries = torch.zeros_like(queries)
        dkeys = k.new_zeros(dstrip.shape[-1], *k.shape[1:], dtype=wide)  # [B + L, Hkv, K]
        dvalues = v.new_zeros(dstrip.shape[-1], *v.shape[1:], dtype=wide)
        for columns, block in self._round(k, None if past is None else past[0], "kv backward"):
            if kept:
                probability = kept[0][..., columns]
            else:
                scores = self._scores(queries, block).masked_fill_(self.hidden[:, columns], float("-inf"))
                probability = scores.sub_(lse[..., None]).exp_()
            dscores = (dstrip[..., columns] - delta).mul_(probability).mul_(self.scale)
            dqueries += dscores @ _keys_first(block, wide)
            dkeys[columns] = torch.einsum("hgtn,hgtk->nhk", dscores, queries)
            dvalues[columns] = torch.einsum("hgtn,hgtv->nhv", probability, douts)
        dpast = torch.cat([dkeys[: self.before], dvalues[: self.before]], dim=2) if past is not None else None
        own = slice(self.starts[self.comm.rank] - self.before, self._columns(self.comm.rank).stop - self.before)
        dk, dv = (self.comm.all_reduce(grad[self.before :], "kv backward") for grad in (dkeys, dvalues))
        return Gradients(_by_token(dqueries), dk.wait()[own], dv.wait()[own], dpast)


def _by_key_head(x: Tensor, key_heads: int) -> Tensor:
    """[T, H, W] -> [Hkv, G, T, W]."""
    return x.unflatten(1, (key_heads, -1)).permute(1, 2, 0, 3)


def _by_token(x: Tensor) -> Tensor:
    """[Hkv, G, T, W] -> [T, H, W]."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)


def _keys_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, Hkv, W] -> [Hkv, 1, n, W]."""
    return x.to(dtype).transpose(0, 1)[:, None]
