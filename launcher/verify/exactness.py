"""One cell of the exactness matrix: a module on N ranks against the same module in one process.

Every rank runs both and compares its own share: outputs, the final state, the gradients of inputs and of the incoming
state, and parameter gradients summed over ranks. The reference is `WholeSequence`; ops are held to token-by-token oracles
elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import SequenceShard, WholeSequence
from longhaul.parallel.comm import Comm
from longhaul.parallel.layout import SequenceLayout

FLOOR = 1e-4  # a reference smaller than this is compared absolutely: zero by cancellation holds rounding errors


def error(actual: Tensor, reference: Tensor) -> float:
    """RMS of the difference over RMS of the reference (or the floor)."""
    if actual.shape != reference.shape:
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    difference = (actual.double() - reference.double()).square().mean().sqrt()
    return (difference / reference.double().square().mean().sqrt().clamp_min(FLOOR)).item()


class Problem(NamedTuple):
    """Inputs of one cell, the same on every rank.

    Attributes:
        x: [L, D]; dy: its output's cotangent, [L, D].
        state: incoming state, or None; dstate: the cotangents of the final state's tensors, or None (no state kept).
    """

    documents: Documents
    x: Tensor
    dy: Tensor
    state: Any
    dstate: list[Tensor] | None


class Outcome(NamedTuple):
    """What a run of the module gave."""

    y: Tensor
    states: list[Tensor]
    dx: Tensor
    dstates: list[Tensor]
    gradients: dict[str, Tensor]


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors of a state, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from tensors(item)


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """A state with `function` applied to each tensor."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, (tuple, list)):
        items = [map_tensors(function, item) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


def make_problem(
    module: nn.Module,
    documents: Documents,
    width: int,
    seed: int,
    dtype: torch.dtype,
    keep_state: bool,
    device: torch.device | str = "cpu",
) -> Problem:
    """Random inputs; the state, where the stream continues a document, is what a run over earlier tokens leaves."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    x, dy = normal(documents.num_tokens, width), normal(documents.num_tokens, width)
    state = None
    if documents.first_position:
        earlier = WholeSequence(Documents((0, documents.first_position)), device, keep_state=True)
        with torch.no_grad():
            state = module(normal(documents.first_position, width), earlier, None)[1]
    dstate = None
    if keep_state:
        with torch.no_grad():
            final = module(x, WholeSequence(documents, device, keep_state=True), state)[1]
        dstate = [normal(*tensor.shape).to(tensor.dtype) for tensor in tensors(final)]
    return Problem(documents, x, dy, state, dstate)


def run(module: nn.Module, shard: SequenceShard, problem: Problem, rows: list[tuple[int, int]]) -> Outcome:
    """Forward and backward of one rank's rows of the problem."""
    x = torch.cat([problem.x[a:b] for a, b in rows]).requires_grad_()
    dy = torch.cat([problem.dy[a:b] for a, b in rows])
    state = map_tensors(lambda tensor: tensor.detach().clone().requires_grad_(), problem.state)
    module.zero_grad()
    y, final = module(x, shard, state)
    finals = list(tensors(final))
    wanted = problem.dstate if problem.dstate is not None else []
    torch.autograd.backward([y, *finals], [dy, *wanted])
    leaves = list(tensors(state))
    return Outcome(
        y.detach(),
        [tensor.detach() for tensor in finals],
        _gradient(x),
        [_gradient(leaf) for leaf in leaves],
        {name: _gradient(parameter) for name, parameter in module.named_parameters()},
    )


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.detach()


def compare(
    module: nn.Module,
    make_shard: Callable[[SequenceLayout, Documents, bool], SequenceShard],
    layout: SequenceLayout,
    problem: Problem,
    comm: Comm,
) -> dict[str, float]:
    """Errors by tensor name, on this rank.

    Args:
        make_shard: from (layout, documents, keep_state) to this rank's shard.
    """
    rows = list(layout.parts[comm.rank])
    shard = make_shard(layout, problem.documents, problem.dstate is not None)
    return errors_of(run(module, shard, problem, rows), alone(module, problem), rows, comm)


def alone(module: nn.Module, problem: Problem) -> Outcome:
    """The reference: the whole problem in one process."""
    whole = WholeSequence(problem.documents, problem.x.device, keep_state=problem.dstate is not None)
    return run(module, whole, problem, [(0, problem.documents.num_tokens)])


def errors_of(actual: Outcome, reference: Outcome, rows: list[tuple[int, int]], comm: Comm) -> dict[str, float]:
    """Errors by tensor name, on this rank, which held `rows`; parameter gradients are summed over ranks here."""
    errors = {
        "output": error(actual.y, torch.cat([reference.y[a:b] for a, b in rows])),
        "input gradient": error(actual.dx, torch.cat([reference.dx[a:b] for a, b in rows])),
    }
    for index, (a, b) in enumerate(zip(actual.states, reference.states)):
        errors[f"final state {index}"] = error(a, b)
    if len(actual.states) != len(reference.states):
        errors["final state"] = float("inf")
    for index, (a, b) in enumerate(zip(actual.dstates, reference.dstates)):
        errors[f"state gradient {index}"] = error(a, b)
    for name, summed in _summed(actual.gradients, comm).items():
        errors[f"gradient of {name}"] = error(summed, reference.gradients[name])
    return errors


def _summed(gradients: dict[str, Tensor], comm: Comm) -> dict[str, Tensor]:
    """The sums over ranks, by one collective a dtype: on few cores a cell spends its time in them."""
    found: dict[str, Tensor] = {}
    for dtype in {gradient.dtype for gradient in gradients.values()}:
        own = {name: gradient for name, gradient in gradients.items() if gradient.dtype == dtype}
        flat = torch.cat([gradient.reshape(-1) for gradient in own.values()])
        parts = comm.all_reduce(flat, "verify").wait().split([gradient.numel() for gradient in own.values()])
        found |= {name: part.reshape(gradient.shape) for (name, gradient), part in zip(own.items(), parts)}
    return {name: found[name] for name in gradients}
