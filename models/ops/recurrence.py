"""What a recurrence offers an exchange, and the one autograd function that orders the two.

A recurrence `S_t = A_t S_{t-1} + b_t`, `o_t = f(S_t, x_t)` is local work around one exchange of segment maps, forward and
backward alike. The function `scan` fixes that order for every op and every exchange:

    forward    summarize -> start ->     local      -> wait ->     correct
    backward   reverse   -> start -> local_backward -> wait -> correct_backward

so that the message is always under way beside the work that does not need it. `reverse` reads no state.

Legend: T tokens, N parts held here, state_shape the shape of one state (without N).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import recompute
from .affine import AffineMap, Linear, accumulate_dtype
from .segments import Documents, Segments

Inputs = tuple[Tensor | None, ...]
Saved = tuple[Tensor | None, ...]


class Summary(NamedTuple):
    """What `summarize` found: the map of each part, tensors to keep for the backward, and work for `correct`."""

    maps: AffineMap
    saved: Saved = ()
    scratch: Any = None


class Reverse(NamedTuple):
    """What `reverse` found: C [N, *state_shape], and work for the rest of the backward."""

    C: Tensor
    scratch: Any = None


class Pending(Protocol):
    """An exchange under way."""

    def wait(self) -> tuple[Tensor, Tensor | None]:
        """What enters each part held here [N, *state_shape], and what leaves the chain (if it was asked for)."""
        ...


class Carry(Protocol):
    """How states travel between the parts of a sequence."""

    def start(self, maps: AffineMap, initial: Tensor | None, reverse: bool, want_end: bool) -> Pending: ...

    def mark(self, event: str) -> None:
        """Note an event of the local work, so that overlap can be shown."""
        ...


class Recurrence:
    """A linear recurrence over tokens; pure: it holds no parameters, only constants.

    `x` is a tuple of tensors with leading axis T (or None where an input is absent). A part whose first segment does not
    enter (`segments.enters`) ignores its incoming state. An op must write `run` and say, by `linear_from_vjp`, what kind
    of map it is; all else is derived here by autograd. A fast op overrides the six phases.
    """

    needs_out = False  # whether correct_backward wants the outputs kept

    def state_shape(self, x: Inputs) -> tuple[int, ...]:
        """Shape of one state."""
        raise NotImplementedError

    def run(self, x: Inputs, segments: Segments, S_in: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The recurrence on each part.

        Args:
            x: the inputs, [T, ...] each.
            S_in: the state entering each part, [N, *state_shape]; None is zero.

        Returns:
            Outputs [T, ...] and the states leaving each part [N, *state_shape].
        """
        raise NotImplementedError

    def linear_from_vjp(self, vjp: Callable[[Tensor], Tensor], offset: Tensor) -> Linear:
        """The linear parts of the maps, from `vjp(G) = M^T G` (`Identity.from_vjp` and its siblings)."""
        raise NotImplementedError

    def zero_state(self, x: Inputs, segments: Segments) -> Tensor:
        """Zero states for the parts held here, [N, *state_shape]."""
        like = next(tensor for tensor in x if tensor is not None)
        return like.new_zeros(segments.num_parts, *self.state_shape(x), dtype=accumulate_dtype(like.dtype))

    # The six phases.
    def summarize(self, x: Inputs, segments: Segments) -> Summary:
        """What the tokens of each part do to the state."""
        with torch.enable_grad():
            state = self.zero_state(x, segments).requires_grad_()
            out, final = self.run(x, segments, state)

            def vjp(cotangent: Tensor) -> Tensor:
                return _grad(final, state, cotangent)

            linear = self.linear_from_vjp(vjp, final.detach())
        return Summary(AffineMap(final.detach(), linear), scratch=out.detach())

    def local(self, x: Inputs, segments: Segments, summary: Summary) -> Tensor:
        """The share of the outputs that needs no incoming state."""
        return summary.scratch

    def correct(self, out: Tensor, x: Inputs, segments: Segments, summary: Summary, S_in: Tensor) -> Tensor:
        """The outputs with `S_in` entering, given that share (which it may overwrite)."""
        return self.run(x, segments, S_in)[0]

    def reverse(self, x: Inputs, segments: Segments, saved: Saved, dout: Tensor) -> Reverse:
        """C: the cotangent of each part's incoming state from the part's own outputs, [N, *state_shape].

        Zero for a part that nothing enters. Reads no state, since outputs are affine in it.
        """
        with torch.enable_grad():
            state = self.zero_state(x, segments).requires_grad_()
            out, _ = self.run(x, segments, state)
            return Reverse(_grad(out, state, dout.to(out.dtype)))

    def local_backward(
        self, x: Inputs, segments: Segments, saved: Saved, dout: Tensor, S_in: Tensor, reverse: Reverse
    ) -> Any:
        """The part of the backward that does not need what comes from the right."""
        return None

    def correct_backward(
        self,
        x: Inputs,
        segments: Segments,
        saved: Saved,
        out: Tensor | None,
        dout: Tensor,
        S_in: Tensor,
        G_out: Tensor,
        partial: Any,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of `x`, `G_out` being the cotangent of each part's outgoing state.

        Includes the boundary term of gates: a decay's gradient has a share <S_out, G_out> at every token of the part.
        """
        with torch.enable_grad():
            leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in x]
            out, final = self.run(tuple(leaves), segments, S_in)
            wanted = [leaf for leaf in leaves if leaf is not None]
            found = iter(
                torch.autograd.grad((out, final), wanted, (dout.to(out.dtype), G_out), allow_unused=True)
            )
            return tuple(None if leaf is None else next(found) for leaf in leaves)

    # Generation and accounting.
    def step(self, x_t: Inputs, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token: inputs [1, ...] and the state [*state_shape] -> output [1, ...], state."""
        one = Segments(Documents((0, 1), first_position=1), [(0, 1)])
        out, final = self.run(x_t, one, state[None])
        return out, final[0]

    def flops_per_token(self, x: Inputs) -> int:
        """Multiply-adds of the recurrent form times two, forward, for one token."""
        raise NotImplementedError


def _grad(output: Tensor, state: Tensor, cotangent: Tensor) -> Tensor:
    """The cotangent of a state; zero where nothing reads it (no part enters, or there is no token)."""
    if not output.requires_grad:
        return torch.zeros_like(state)
    return torch.autograd.grad(
        output, state, cotangent, retain_graph=True, allow_unused=True, materialize_grads=True
    )[0]


class EachPart:
    """The carry of parts that are sequences of their own: states [N, *state_shape] in, states [N, *state_shape] out."""

    def __init__(self, segments: Segments) -> None:
        self.segments = segments

    def start(self, maps: AffineMap, initial: Tensor | None, reverse: bool, want_end: bool) -> Pending:
        entering = torch.zeros_like(maps.offset) if initial is None else initial.to(maps.offset.dtype)
        if not reverse:
            entering = _where(self.segments.enters, entering, torch.zeros_like(entering))
        # A part whose first token starts a document is cut, so what enters it never leaves it.
        leaving = _where(self.segments.cuts, maps.offset, maps.apply(entering)) if want_end else None
        return _Done(entering, leaving)

    def mark(self, event: str) -> None:
        pass


class _Done:
    def __init__(self, entering: Tensor, leaving: Tensor | None) -> None:
        self.result = entering, leaving

    def wait(self) -> tuple[Tensor, Tensor | None]:
        return self.result


def _where(flags: Sequence[bool], yes: Tensor, no: Tensor) -> Tensor:
    """Choose along the leading axis by host flags."""
    if all(flags):
        return yes
    if not any(flags):
        return no
    return torch.stack([yes[i] if flag else no[i] for i, flag in enumerate(flags)])


class ChunkedRecurrence(Recurrence):
    """A recurrence that writes the six phases itself; `run` is then the same work with no wire in between."""

    def run(self, x: Inputs, segments: Segments, S_in: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out, S_out = scan(self, x, segments, EachPart(segments), initial=S_in, want_end=True)
        assert S_out is not None
        return out, S_out


def _device_type(x: Inputs) -> str:
    return next(tensor.device.type for tensor in x if tensor is not None)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        op: Recurrence,
        segments: Segments,
        carry: Carry,
        want_end: bool,
        initial: Tensor | None,
        *x: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(_device_type(x), enabled=False):  # states are summed in float32 at least
            return _Scan._forward(ctx, op, segments, carry, want_end, initial, x)

    @staticmethod
    def _forward(
        ctx: Any, op: Recurrence, segments: Segments, carry: Carry, want_end: bool, initial: Tensor | None, x: Inputs
    ) -> tuple[Tensor, Tensor | None]:
        def compute() -> tuple[Tensor, Tensor, Tensor | None, Saved, Linear]:
            summary = op.summarize(x, segments)
            pending: Pending = recompute.begin(lambda: carry.start(summary.maps, initial, False, want_end))
            carry.mark("local start")
            out = op.local(x, segments, summary)
            carry.mark("local end")
            S_in, S_end = pending.wait()
            return op.correct(out, x, segments, summary, S_in), S_in, S_end, summary.saved, summary.maps.linear

        out, S_in, S_end, saved, linear = recompute.dear(compute)
        ctx.op, ctx.segments, ctx.carry, ctx.linear = op, segments, carry, linear
        ctx.has_initial, ctx.num_x = initial is not None, len(x)
        ctx.save_for_backward(*x, *saved, S_in, out if op.needs_out else None)
        return out, S_end if want_end else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dS_end: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.autocast(dout.device.type, enabled=False):
            return _Scan._backward(ctx, dout, dS_end)

    @staticmethod
    def _backward(ctx: Any, dout: Tensor, dS_end: Tensor | None) -> tuple[Tensor | None, ...]:
        op, segments, carry = ctx.op, ctx.segments, ctx.carry
        *tensors, S_in, out = ctx.saved_tensors
        x, saved = tuple(tensors[: ctx.num_x]), tuple(tensors[ctx.num_x :])
        reverse = op.reverse(x, segments, saved, dout)
        maps = AffineMap(reverse.C, ctx.linear.adjoint())
        want_start = ctx.has_initial and ctx.needs_input_grad[4]
        pending = carry.start(maps, dS_end, True, want_start)
        carry.mark("local start")
        partial = op.local_backward(x, segments, saved, dout, S_in, reverse)
        carry.mark("local end")
        G_out, dS_start = pending.wait()
        grads = op.correct_backward(x, segments, saved, out, dout, S_in, G_out, partial)
        return (None, None, None, None, dS_start if want_start else None, *grads)


def scan(
    op: Recurrence,
    x: Sequence[Tensor | None],
    segments: Segments,
    carry: Carry,
    initial: Tensor | None = None,
    want_end: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Run `op` over a whole sequence, of which `x` holds the parts here.

    Args:
        x: inputs, [T, ...] each.
        carry: how states travel between parts.
        initial: the state entering the sequence, as the carry takes it (replicated); None is zero.
        want_end: whether the state leaving the sequence is wanted.

    Returns:
        Outputs [T, ...] and the state leaving the sequence (replicated), or None.
    """
    return _Scan.apply(op, segments, carry, want_end, initial, *x)
