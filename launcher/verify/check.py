"""What is checked in one cell, on one rank.

A *finding* is a number that must not exceed its limit: an error relative to the reference, or a change where no bit may
change (limit 0).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import SequenceShard, WholeSequence
from longhaul.parallel.comm import Comm
from longhaul.parallel.engine import SequenceParallel
from longhaul.parallel.layout import SequenceLayout
from longhaul.parallel.mesh import Degrees, ParallelMesh
from longhaul.parallel.runtime import Runtime
from longhaul.parallel.shard import RankShard

from . import loss
from .cells import DTYPES, TOLERANCE, Cell, engine_of, inner_size, stream_of
from .exactness import FLOOR, Outcome, Problem, alone, error, errors_of, make_problem, run
from .subjects import WIDTH, subject
from .tables import STREAMS

KEPT = 8  # references held at once; cells that share one are neighbours

Findings = dict[str, tuple[float, float]]  # name -> (value, limit)


class Reference(NamedTuple):
    """A module, its problem, and what it gives in one process.

    Attributes:
        documents: outputs and input gradients of every document by itself, end to end, [L, D] each. In fp64 alone: a
            document by itself is computed in other shapes, and norms of one-token documents magnify the rounding of
            float32 (in which isolation is held bit for bit anyway).
    """

    module: nn.Module
    problem: Problem
    outcome: Outcome
    documents: tuple[Tensor, ...]


class Checker:
    """One rank's side of the matrix: groups and references are made once.

    Args:
        runtime: this process in the job whose ranks hold the stream.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, size = runtime, inner_size(runtime.world_size)
        device = runtime.device.type
        self.mesh = ParallelMesh(Degrees(sequence=runtime.world_size), runtime.rank, device)
        self.comm = Comm(self.mesh.sequence_group)
        levels = ParallelMesh(Degrees(data=runtime.world_size // size, sequence=size), runtime.rank, device)
        ledger = self.comm.ledger
        self.inner, self.outer = Comm(levels.sequence_group, ledger), Comm(levels.data_group, ledger)
        self.references: OrderedDict[tuple[str, ...], Reference] = OrderedDict()

    def check(self, cell: Cell) -> Findings:
        """All findings of a cell on this rank.

        Raises:
            UserError: the engines refuse the cell.
        """
        engine = engine_of(cell, self.comm, self.inner, self.outer)
        limit = TOLERANCE[cell.dtype]
        if subject(cell.mixer).is_model:
            errors = loss.errors(cell, engine, self.runtime, self.mesh, self.comm)
            return {name: (value, limit) for name, value in errors.items()}
        reference = self._reference(cell)
        documents = reference.problem.documents
        rows = list(self._rows(engine, documents))
        shard = self._shard(engine, documents, STREAMS[cell.stream][1])
        actual = run(reference.module, shard, reference.problem, rows)
        errors = errors_of(actual, reference.outcome, rows, self.comm)
        for name, found, expected in zip(("output", "input gradient"), (actual.y, actual.dx), reference.documents):
            errors[f"{name} of each document alone"] = error(found, _take(expected, rows))
        findings = {name: (value, limit) for name, value in errors.items()}
        return findings | self._edited(cell, shard, reference, rows, actual.y)

    def _rows(self, engine: SequenceParallel, documents: Documents) -> Any:
        return engine.local_tokens(documents)

    def _shard(self, engine: SequenceParallel, documents: Documents, keep_state: bool) -> SequenceShard:
        if self.comm.size > 1:
            return engine.shard(documents, self.runtime.device, keep_state)
        # One rank is an ordinary case of every engine, though a job of one process does not use them.
        layout = SequenceLayout.contiguous(documents.num_tokens, 1)
        return RankShard(layout, documents, self.comm, engine.exchange, engine.attention, self.runtime.device, keep_state)

    def _reference(self, cell: Cell) -> Reference:
        key = (cell.mixer, cell.documents, cell.stream, cell.dtype)
        if key in self.references:
            self.references.move_to_end(key)
            return self.references[key]
        dtype, device = DTYPES[cell.dtype], self.runtime.device
        module = subject(cell.mixer).make().to(device=device, dtype=dtype)
        problem = make_problem(module, stream_of(cell), WIDTH, 1, dtype, STREAMS[cell.stream][1], device)
        outcome = alone(module, problem)
        documents = _each_document(module, problem, self.comm) if cell.dtype == "fp64" else ()
        found = Reference(module, problem, outcome, documents)
        self.references[key] = found
        if len(self.references) > KEPT:
            self.references.popitem(last=False)
        return found

    def _edited(
        self, cell: Cell, shard: SequenceShard, reference: Reference, rows: list[tuple[int, int]], y: Tensor
    ) -> Findings:
        """Edit a document from some token on: nothing before that token changes, nor a bit of any other document.

        The cotangent is that document's alone, so that gradients in other documents are zero, exactly.
        """
        problem = reference.problem
        documents = problem.documents
        token = sum(map(ord, cell.key)) % documents.num_tokens
        document = next(d for d in range(documents.num_documents) if documents.bounds[d + 1] > token)
        first, last = documents.bounds[document], documents.bounds[document + 1]
        x, dy = problem.x.clone(), torch.zeros_like(problem.dy)
        x[token:last] = -x[token:last].flip(0) + 0.5
        dy[first:last] = problem.dy[first:last]
        # The state is asked for as before (the shard is the same), since an exchange may take another way without it.
        dstate = None if problem.dstate is None else [torch.zeros_like(tensor) for tensor in problem.dstate]
        edited = problem._replace(x=x, dy=dy, dstate=dstate)
        actual = run(reference.module, shard, edited, rows)
        where = torch.cat([torch.arange(a, b) for a, b in rows]).to(x.device)
        other, before = (where < first) | (where >= last), (where >= first) & (where < token)
        change = (actual.y - y).abs().amax(1) if y.numel() else y.new_zeros(0)
        scale = max(reference.outcome.y.double().square().mean().sqrt().item(), FLOOR)
        findings = {
            "isolation: output of another document": _bits(change[other], scale, cell),
            "isolation: gradient in another document": (_most(actual.dx[other].abs().flatten()), 0.0),
        }
        if subject(cell.mixer).causal:
            name = "causality: output before an edited token"
            findings[name] = _most(change[before]) / scale, TOLERANCE[cell.dtype]
        if document > 0:
            leaked = max((_most(leaf.abs().flatten()) for leaf in actual.dstates), default=0.0)
            findings["isolation: gradient of the incoming state"] = (leaked, 0.0)
        return findings


def _take(x: Tensor, rows: list[tuple[int, int]]) -> Tensor:
    return torch.cat([x[a:b] for a, b in rows])


def _bits(change: Tensor, scale: float, cell: Cell) -> tuple[float, float]:
    """No bit may change where shapes are static; elsewhere no more than rounding does."""
    return (_most(change), 0.0) if subject(cell.mixer).static else (_most(change) / scale, TOLERANCE[cell.dtype])


def _most(values: Tensor) -> float:
    return values.max().item() if values.numel() else 0.0


def _each_document(module: nn.Module, problem: Problem, comm: Comm) -> tuple[Tensor, ...]:
    """Outputs and input gradients of every document as a stream of its own, each computed by one of the ranks.

    The last one's cotangent includes that of the final state, which is its own state.
    """
    bounds = problem.documents.bounds
    found = torch.zeros_like(torch.stack([problem.dy, problem.dy]))
    for document, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        if document % comm.size != comm.rank:
            continue
        one = Documents((0, stop - start), problem.documents.first_position if document == 0 else 0)
        keeps = problem.dstate if document == len(bounds) - 2 else None
        shard = WholeSequence(one, problem.x.device, keep_state=keeps is not None)
        own = Problem(one, problem.x[start:stop], problem.dy[start:stop], problem.state if document == 0 else None, keeps)
        outcome = run(module, shard, own, [(0, stop - start)])
        found[:, start:stop] = torch.stack([outcome.y, outcome.dx])
    whole: Tensor = comm.all_reduce(found, "verify").wait()  # of numbers and zeros: exact
    return tuple(whole)
