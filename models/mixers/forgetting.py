"""Against state collapse: a state too large for what it was trained on learns not to forget, and fails on longer texts.

Chen et al., "Stuffed Mamba" (arXiv 2410.07145), section 5; its code for these is not released, so details are ours.

    paper                                          here
    forget more, insert less                       forget times the log decay, insert times dt B x
    clip the state's norm                          clipped, each head's, where a state enters a stream
    sliding window, S_t - (prod A) S_{t-w}         windowed_scan: what a token wrote is gone after w tokens, exactly

The first and the third are linear: exact for any number of ranks and chunks. Clipping is not, so it breaks associativity. It is
done where a state enters a *stream* (a carried state, a chunk's border, a generated token), never between ranks: results do
not depend on ranks, but they do on where streams are cut.

Legend: T tokens held here, N parts, H heads, G groups, K state width, V head width, w tokens of the window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.recurrence import Recurrence
from ..sequence import SequenceShard


class WindowState(NamedTuple):
    """`rows` [w, G K + H V + H], keys, values and log decays of the last w tokens; `S` [H, K, V], what has left the window."""

    rows: Tensor | None
    S: Tensor | None


def clipped(S: Tensor | None, largest: float | None) -> Tensor | None:
    """A state [H, K, V] whose heads' Frobenius norms are at most `largest`."""
    if S is None or largest is None:
        return S
    norm = torch.linalg.vector_norm(S, dim=(-2, -1), keepdim=True)
    return S * (largest / norm.clamp_min(largest))


def windowed_scan(
    shard: SequenceShard,
    op: Recurrence,
    x: tuple[Tensor, Tensor, Tensor, Tensor],
    window: int,
    state: Tensor | None,
    leaving: WindowState | None,
) -> tuple[Tensor, Tensor | None, WindowState]:
    """A recurrence of which each token sees the last `window` tokens of its document, itself included.

    `S'_t = a_t S'_{t-1} + (a_{t-w+1} .. a_t) k_{t-w}^T v_{t-w}` is what tokens up to t - w left behind: the same recurrence, w
    tokens late, on values that have decayed for w tokens. The output reads `S_t - S'_t`.

    Args:
        x: q [T, G, K], k [T, G, K], v [T, H, V], log decay [T, H].
        state: S of the stream before, [H, K, V]. leaving: of the stream before.

    Returns:
        [T, H, V], S after the stream, and what has left the window.
    """
    q, k, v, log_decay = x
    wide = torch.promote_types(v.dtype, log_decay.dtype)
    rows = torch.cat([k.flatten(1).to(wide), v.flatten(1).to(wide), log_decay.to(wide)], dim=1)  # [T, n]
    context, kept = shard.halo(rows, window, None if leaving is None else leaving.rows)  # [N, w, n]
    late, faded = [], []
    bounds = shard.segments.part_bounds
    for before, start, stop in zip(context, bounds, bounds[1:]):
        whole = torch.cat([before, rows[start:stop]])
        late.append(whole[: stop - start])
        # In float64: a sum over a window is a difference of sums over the part.
        sums = whole[:, -log_decay.shape[1] :].double().cumsum(0)
        faded.append((sums[window:] - sums[: stop - start]).to(wide))
    widths = [k.shape[1] * k.shape[2], v.shape[1] * v.shape[2], log_decay.shape[1]]
    late_k, late_v, _ = torch.cat([rows[:0], *late]).split(widths, dim=1)
    left = shard.positions >= window  # a token of the same document has left
    fading = torch.cat([log_decay[:0].to(wide), *faded]).exp().masked_fill(~left[:, None], 0)  # [T, H]
    late_k = late_k.masked_fill(~left[:, None], 0).view_as(k).to(k.dtype)
    late_v = (late_v.view_as(v) * fading[..., None]).masked_fill(~left[:, None, None], 0).to(v.dtype)
    out, S = shard.scan(op, (q, k, v, log_decay), state)
    gone, S_left = shard.scan(op, (q, late_k, late_v, log_decay), None if leaving is None else leaving.S)
    return out - gone, S, WindowState(kept, S_left)
