"""RSA: Ring Self-Attention as published, with the whole strip of scores.

Li et al. (arXiv 2105.13120), section 3.2. Keys go round the ring once, which completes a rank's strips of scores, one for
each document it holds tokens of; a row softmax makes them probabilities; values go round once more. The backward sends
values round again (for the strips' cotangents) and keys (for the queries'), and sums the gradients of keys and values, each
of full length L, by one all-reduce each, of which every rank keeps its slice. Strips are kept for the backward, as published;
after activation checkpointing they are rebuilt from the log-sum-exp while the keys go round.

The paper is about bidirectional attention; causal masks hide scores but spare no message. Every layout, with or without
packed documents; its paper's experiments train on `contiguous_per_document`, where B documents of l tokens have strips of
B H l^2 / P elements on a rank: the paper's B Z L^2 / N.

Received per rank and layer, with N tokens, n_p of them here: forward (N - n_p) Hkv (K + V) elements of the input dtype;
backward the same, plus 2 (P - 1) / P N Hkv (K + V) of the accumulation dtype. An all-reduce is counted as the ring that
does it: a reduce-scatter and an all-gather, each P - 1 messages of 1 / P of the payload. On even ranks with Hkv K = Hkv V =
D these are the paper's 2 (P - 1) n D forward and 6 (P - 1) n D backward.

The Linformer variant (section 3.3), in which no length is whole anywhere, needs no engine: see
`LinformerAttention` in `longhaul.models.bidirectional`.

Legend: T tokens held here, L tokens of the stream, t tokens of a document held here, l all of its keys, n tokens of a block
(nd of one document), B tokens of the incoming state, P ranks, H heads, Hkv key heads, G = H / Hkv, K, V widths.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from longhaul.models.ops import recompute
from longhaul.models.ops.attention import Mask
from longhaul.parallel.comm import Comm
from longhaul.parallel.shard import RankShard

from .base import Call, Engine, Gradients, Past, Shape, accumulation, cached, holdings
from .pieces import Run, by_document, coordinates, past_runs, seen
from .rotate import Rotation


class Strip(NamedTuple):
    """The scores of one document: its queries here against all of its keys.

    Attributes:
        rows: of this rank's tokens, the queries.
        keys: for each rank, and last for the incoming state, the rows of its block.
        columns: where those stand in the strip.
        hidden: scores that the mask hides, bool [t, l]; None if there are none.
    """

    rows: slice
    keys: list[slice]
    columns: list[slice]
    hidden: Tensor | None

    def empty(self, queries: Tensor) -> Tensor:
        """[Hkv, G, T, K] -> memory for [Hkv, G, t, l]."""
        return queries.new_empty(*queries.shape[:2], self.rows.stop - self.rows.start, self.columns[-1].stop)


class RingSelfAttention(Engine):
    """K ring, then V ring; strips of scores are held whole. Bidirectional and causal, no window."""

    name = "rsa"
    serves_windows = False

    def call(self, shard: RankShard, shape: Shape, mask: Mask, scale: float, before: int, dtype: torch.dtype) -> Call:
        tokens = [held.num_tokens for held in holdings(shard)]
        strips = cached(shard, (self.name, mask, before), lambda: self._strips(shard, mask, before))
        return _Call(self.comm, tokens, strips, scale, before)

    def _strips(self, shard: RankShard, mask: Mask, before: int) -> list[Strip]:
        """One for each document with tokens here."""
        runs = [*(held.runs for held in holdings(shard)), past_runs(before)]
        places = [coordinates(own, shard.device) for own in runs] if mask.causal else []
        rows = [{document: _rows(found) for document, found in by_document(own).items()} for own in runs]
        strips = []
        for document, own in rows[self.comm.rank].items():
            keys = [held.get(document, slice(0, 0)) for held in rows]
            columns, width = [], 0
            for block in keys:
                columns.append(slice(width, width + block.stop - block.start))
                width = columns[-1].stop
            hidden = None
            if mask.causal:
                queries = (places[self.comm.rank][0][own], places[self.comm.rank][1][own])
                joined = [torch.cat([place[of][block] for place, block in zip(places, keys)]) for of in (0, 1)]
                hidden = ~seen(queries, (joined[0], joined[1]), mask)
            strips.append(Strip(own, keys, columns, hidden))
        return strips


def _rows(runs: list[Run]) -> slice:
    """Where the runs of one document stand: a rank's rows are in stream order, so nothing is between them."""
    assert all(a.stop == b.start for a, b in zip(runs, runs[1:]))
    return slice(runs[0].start, runs[-1].stop)


class _Call(Call):
    def __init__(self, comm: Comm, tokens: list[int], strips: list[Strip], scale: float, before: int) -> None:
        self.comm, self.tokens, self.strips, self.scale, self.before = comm, tokens, strips, scale, before
        # Where each block stands in gradients of full length: those of the incoming state first, then by rank.
        self.starts = [*(before + sum(tokens[:rank]) for rank in range(comm.size)), 0]
        self.scores: list[Tensor] = []

    def _round(self, own: Tensor, past: Tensor | None, label: str) -> Iterator[tuple[int, Tensor]]:
        """(whose, block [n, Hkv, W]) of the incoming state (`P`), of this rank, then of every other."""

        def empty(rank: int) -> tuple[Tensor, ...]:
            return (own.new_empty(self.tokens[rank], *own.shape[1:]),)

        reach = [self.comm.size - 1 if count else 0 for count in self.tokens]
        rotation = Rotation(self.comm, (own,), empty, reach, label)
        if past is not None:
            yield self.comm.size, past
        yield self.comm.rank, own
        for _, source, block in rotation:
            if block is not None:
                yield source, block[0]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, past: Past) -> tuple[Tensor, Tensor]:
        wide, key_heads = accumulation(q.dtype), k.shape[1]
        queries = _by_key_head(q.to(wide), key_heads)  # [Hkv, G, T, K]
        scores = [strip.empty(queries) for strip in self.strips]  # [Hkv, G, t, l] each
        for source, block in self._round(k, None if past is None else past[0], "kv forward"):
            for strip, all_scores in zip(self.strips, scores):
                all_scores[..., strip.columns[source]] = self._scores(strip, queries, block[strip.keys[source]])
        lse = queries.new_empty(queries.shape[:3])
        for strip, all_scores in zip(self.strips, scores):
            if strip.hidden is not None:
                all_scores.masked_fill_(strip.hidden, float("-inf"))
            lse[..., strip.rows] = own_lse = all_scores.logsumexp(-1)
            all_scores.sub_(own_lse[..., None]).exp_()
        out = queries.new_zeros(*queries.shape[:3], v.shape[2])
        for source, block in self._round(v, None if past is None else past[1], "kv forward"):
            for strip, probability in zip(self.strips, scores):
                values = _keys_first(block[strip.keys[source]], wide)
                out[..., strip.rows, :] += probability[..., strip.columns[source]] @ values
        self.scores = scores
        return _by_token(out), lse

    def _scores(self, strip: Strip, queries: Tensor, keys: Tensor) -> Tensor:
        """[Hkv, G, T, K] x [nd, Hkv, K] -> [Hkv, G, t, nd]."""
        return (queries[..., strip.rows, :] @ _keys_first(keys, queries.dtype).mT).mul_(self.scale)

    def residuals(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        scores, self.scores = self.scores, []
        return (q, k, v, out, lse) if recompute.taped() else (q, k, v, out, lse, *scores)

    def backward(self, dout: Tensor, residuals: tuple[Tensor, ...], past: Past) -> Gradients:
        q, k, v, out, lse, *kept = residuals
        wide, key_heads = accumulation(q.dtype), k.shape[1]
        queries, douts = _by_key_head(q.to(wide), key_heads), _by_key_head(dout.to(wide), key_heads)
        delta = (douts * _by_key_head(out.to(wide), key_heads)).sum(-1, keepdim=True)
        cotangents = [strip.empty(queries) for strip in self.strips]
        for source, block in self._round(v, None if past is None else past[1], "kv backward"):
            for strip, cotangent in zip(self.strips, cotangents):
                values = _keys_first(block[strip.keys[source]], wide)
                cotangent[..., strip.columns[source]] = douts[..., strip.rows, :] @ values.mT
        dqueries = torch.zeros_like(queries)
        full = self.before + sum(self.tokens)
        dkeys = k.new_zeros(full, *k.shape[1:], dtype=wide)  # [B + L, Hkv, K]
        dvalues = v.new_zeros(full, *v.shape[1:], dtype=wide)
        for source, block in self._round(k, None if past is None else past[0], "kv backward"):
            for index, (strip, cotangent) in enumerate(zip(self.strips, cotangents)):
                rows, columns, own = strip.rows, strip.columns[source], strip.keys[source]
                if kept:
                    probability = kept[index][..., columns]
                else:
                    probability = self._scores(strip, queries, block[own])
                    if strip.hidden is not None:
                        probability.masked_fill_(strip.hidden[:, columns], float("-inf"))
                    probability.sub_(lse[..., rows, None]).exp_()
                dscores = (cotangent[..., columns] - delta[..., rows, :]).mul_(probability).mul_(self.scale)
                dqueries[..., rows, :] += dscores @ _keys_first(block[own], wide)
                place = slice(self.starts[source] + own.start, self.starts[source] + own.stop)
                dkeys[place] = torch.einsum("hgtn,hgtk->nhk", dscores, queries[..., rows, :])
                dvalues[place] = torch.einsum("hgtn,hgtv->nhv", probability, douts[..., rows, :])
        dpast = torch.cat([dkeys[: self.before], dvalues[: self.before]], dim=2) if past is not None else None
        first = self.starts[self.comm.rank] - self.before
        mine = slice(first, first + self.tokens[self.comm.rank])
        dk, dv = (self.comm.all_reduce(grad[self.before :], "kv backward") for grad in (dkeys, dvalues))
        return Gradients(_by_token(dqueries), dk.wait()[mine], dv.wait()[mine], dpast)


def _by_key_head(x: Tensor, key_heads: int) -> Tensor:
    """[T, H, W] -> [Hkv, G, T, W]."""
    return x.unflatten(1, (key_heads, -1)).permute(1, 2, 0, 3)


def _by_token(x: Tensor) -> Tensor:
    """[Hkv, G, T, W] -> [T, H, W]."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)


def _keys_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, Hkv, W] -> [Hkv, 1, n, W]."""
    return x.to(dtype).transpose(0, 1)[:, None]
