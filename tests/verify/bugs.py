"""Thirteen known bugs of sequence-parallel training, patched into the product code of the process that asks.

Each is a context manager. What is patched is what a person could have written there; nothing of the verification is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import longhaul.launcher.step
import longhaul.models.ops.convolution.chunk as convolution
import longhaul.parallel.data
import longhaul.parallel.exchange.walk as walk
from longhaul.models.lm import LanguageHead
from longhaul.models.ops.affine import Constant, Dense
from longhaul.models.ops.chain import Link
from longhaul.models.ops.routing import Buckets
from longhaul.models.ops.scalar_decay import ScalarDecay
from longhaul.models.ops.scalar_decay.products import Chunks
from longhaul.models.ops.segments import Documents, Segments
from longhaul.parallel.attention import all_gather as gathered_attention
from longhaul.parallel.comm import Comm
from longhaul.parallel.engine import SequenceParallel
from longhaul.parallel.layout import SequenceLayout

Patch = Iterator[None]


@contextlib.contextmanager
def none() -> Patch:
    """No bug."""
    yield


@contextlib.contextmanager
def missing_transpose() -> Patch:
    """The adjoint of a dense map is the map itself."""
    with patch.object(Dense, "adjoint", lambda self: self):
        yield


@contextlib.contextmanager
def no_boundary_term() -> Patch:
    """A gate's gradient without what comes through the outgoing state, <S_out, G_out>."""
    right = ScalarDecay.correct_backward

    def wrong(op: ScalarDecay, x: Any, segments: Any, saved: Any, out: Any, dout: Any, S_in: Any, G_out: Any, _: Any) -> Any:
        def again(G: Tensor) -> Any:  # a partial gradient is added to, so each call gets its own
            partial = op.local_backward(x, segments, saved, dout, S_in, op.reverse(x, segments, saved, dout))
            return right(op, x, segments, saved, out, dout, S_in, G, partial)

        return (*again(G_out)[:3], again(torch.zeros_like(G_out))[3])

    with patch.object(ScalarDecay, "correct_backward", wrong):
        yield


@contextlib.contextmanager
def halo_across_documents() -> Patch:
    """A convolution that looks back over a document's start."""
    right = convolution._make_edges

    def wrong(segments: Segments, taps: int, device: torch.device) -> Any:
        positions = segments.positions() + taps  # as if every document had begun earlier
        with patch.object(segments, "positions", lambda *_: positions):
            return right(segments, taps, device)

    with patch.object(convolution, "_make_edges", wrong):
        yield


@contextlib.contextmanager
def one_head_broadcasts() -> Patch:
    """One head's decays are taken for decays that all heads share, which have no gradient."""
    right = Chunks.local_gradients

    def wrong(self: Chunks, *args: Any, **kwargs: Any) -> Any:
        dq, dk, dv, dlog = right(self, *args, **kwargs)
        return dq, dk, dv, dlog.zero_() if dlog is not None and dlog.shape[2] == 1 else dlog

    with patch.object(Chunks, "local_gradients", wrong):
        yield


@contextlib.contextmanager
def decay_off_by_one() -> Patch:
    """A part of n tokens decays the state n - 1 times."""
    right = Constant.act

    def wrong(self: Constant, state: Tensor) -> Tensor:
        return right(Constant(self.log_decay, [max(length - 1, 0) for length in self.lengths]), state)

    with patch.object(Constant, "act", wrong):
        yield


@contextlib.contextmanager
def leak_at_a_reset() -> Patch:
    """What came before a document's start leaves the part it starts in."""
    right = SequenceLayout.chain

    def wrong(self: SequenceLayout, documents: Documents) -> tuple[Link, ...]:
        return tuple(link._replace(cut=False, tail=link.length) for link in right(self, documents))

    with patch.object(SequenceLayout, "chain", wrong):
        yield


@contextlib.contextmanager
def gradient_over_ranks() -> Patch:
    """Gradients averaged over ranks, as DDP does by itself."""
    right = longhaul.parallel.data._sum_bucket

    def wrong(comm: Comm, bucket: Any) -> Any:
        bucket.buffer().div_(comm.size)
        return right(comm, bucket)

    wrong.__annotations__ = right.__annotations__  # DDP looks at them
    with patch.object(longhaul.parallel.data, "_sum_bucket", wrong):
        yield


@contextlib.contextmanager
def zigzag_as_contiguous() -> Patch:
    """Ranks are told that they hold a zigzag's parts, but are fed consecutive tokens."""
    right = SequenceParallel.local_tokens

    def wrong(self: SequenceParallel, tokens: Any) -> tuple[tuple[int, int], ...]:
        if "zigzag" not in self.layout_name:
            return right(self, tokens)
        layout = self.layout(tokens)
        start = sum(layout.tokens_of(rank) for rank in range(self.comm.rank))
        return ((start, start + layout.tokens_of(self.comm.rank)),)

    with patch.object(SequenceParallel, "local_tokens", wrong):
        yield


@contextlib.contextmanager
def stale_keys() -> Patch:
    """The backward gathers from a buffer that still holds the last call's keys and values."""
    right = gathered_attention._Call._start
    calls: list[tuple[Tensor, Tensor]] = []

    def wrong(self: Any, k: Tensor, v: Tensor, index: int, label: str) -> Any:
        if label == "kv forward":
            calls.extend([(k.detach().clone(), v.detach().clone())] if index == 0 else [])
        elif len(calls) > 1 and calls[-2][0].shape == k.shape:
            k, v = calls[-2]
        else:
            k, v = torch.zeros_like(k), torch.zeros_like(v)  # nothing has been there yet
        return right(self, k, v, index, label)

    with patch.object(gathered_attention._Call, "_start", wrong):
        yield


@contextlib.contextmanager
def unsorted_bucket() -> Patch:
    """An unstable sort: a memory gets its tokens in another order than they stand in time."""
    right = Buckets.__init__

    def unstable(self: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.sort(self.flip(0), stable=True).indices.neg() + self.shape[0] - 1

    def wrong(self: Buckets, *args: Any, **kwargs: Any) -> None:
        with patch.object(torch.Tensor, "argsort", unstable):
            right(self, *args, **kwargs)

    with patch.object(Buckets, "__init__", wrong):
        yield


@contextlib.contextmanager
def label_shifted_late() -> Patch:
    """Labels made from the tokens a rank holds: at its edge they are those of its own start."""
    right = longhaul.launcher.step.place

    def wrong(*args: Any, **kwargs: Any) -> Any:
        batch = right(*args, **kwargs)
        batch.labels = batch.tokens.roll(-1)
        return batch

    with patch.object(longhaul.launcher.step, "place", wrong):
        yield


@contextlib.contextmanager
def chained_bf16() -> Patch:
    """The running state is rounded to bfloat16 at every rank it passes."""
    right = walk.pass_through

    def wrong(*args: Any) -> Tensor:
        state = right(*args)
        return state if state.is_complex() else state.bfloat16().to(state.dtype)

    with patch.object(walk, "pass_through", wrong):
        yield


@contextlib.contextmanager
def local_count() -> Patch:
    """The mean of the ranks' means: each divides its loss by the valid tokens it holds itself."""
    right_place, right_head = longhaul.launcher.step.place, LanguageHead.forward
    whole = {"count": 1.0, "ranks": 1}

    def place(stream: Any, engine: SequenceParallel, *args: Any) -> Any:
        whole.update(count=float(stream.weights.sum()), ranks=engine.comm.size)
        return right_place(stream, engine, *args)

    def head(self: LanguageHead, hidden: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        loss, count = right_head(self, hidden, labels, weights)
        if whole["ranks"] > 1:
            loss = loss / count.clamp_min(1) / whole["ranks"] * whole["count"]  # the step divides by the global count
        return loss, count

    with patch.object(longhaul.launcher.step, "place", place), patch.object(LanguageHead, "forward", head):
        yield
