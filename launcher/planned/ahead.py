"""Plans of the next steps, made in the background while the present one trains.

The plan of step `s` uses the costs that were known when step `s - ahead` began. So a thread can make it before step `s` begins,
and a resumed run, which reads those costs from its checkpoint, makes the same plan.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from longhaul.launcher.data import Stream
from longhaul.parallel.planner import Cluster, CostModel, Plan, plan
from longhaul.parallel.planner.calibrate import Sample
from longhaul.parallel.planner.learn import Learner

from .config import PlannerConfig
from .inputs import cluster_from_json, cluster_to_json, most_tokens


@dataclass(frozen=True)
class Piece:
    """Tokens `start .. stop` of a step's stream, all of one document; `position` of them are in earlier streams."""

    stream: int
    start: int
    stop: int
    position: int

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class Step:
    """What a step trains on, and how.

    Attributes:
        streams: the whole global batch.
        pieces: documents of the plan, which names them by their index here.
        long: documents that no group holds; they are streamed.
        plan: None if all documents are long.
        weight: valid tokens of the step.
        seconds: that reading and planning took.
    """

    streams: Sequence[Stream]
    pieces: tuple[Piece, ...]
    long: tuple[Piece, ...]
    plan: Plan | None
    weight: float
    seconds: float

    @property
    def lengths(self) -> list[int]:
        return [piece.length for piece in self.pieces]

    @property
    def positions(self) -> list[int]:
        return [piece.position for piece in self.pieces]


def pieces_of(streams: Sequence[Stream]) -> list[Piece]:
    """Documents of a step's streams, cut where streams end, as without a planner."""
    return [
        Piece(index, start, stop, 0 if start else stream.first_position)
        for index, stream in enumerate(streams)
        for start, stop in zip(stream.bounds, stream.bounds[1:])
    ]


class StepPlanner:
    """Reads and plans steps.

    Args:
        read: the global batch that begins with a sample, from the sample's number; called by threads.
        batch: samples of a step.
        cluster, model: at the start.
        config: how far ahead, how much work, whether to learn.
        pod_ranks: as `plan` takes it.
    """

    def __init__(
        self,
        read: Callable[[int], Sequence[Stream]],
        batch: int,
        cluster: Cluster,
        model: CostModel,
        config: PlannerConfig,
        pod_ranks: int | None = 0,
    ) -> None:
        self.read, self.batch, self.config, self.pod_ranks = read, batch, config, pod_ranks
        self.learner = Learner(model, cluster)
        self._begun = [self.learner] * config.ahead  # as they were when the last steps began, oldest first
        self._pending: dict[int, Future[Step]] = {}

    def take(self, consumed: int) -> Step:
        """The step that begins with sample `consumed`; those after it are begun."""
        self._begun = [*self._begun, self.learner][-self.config.ahead - 1 :]
        for distance, learner in enumerate(self._begun):
            first = consumed + distance * self.batch
            if first not in self._pending:
                self._pending[first] = self._start(first, learner)
        return self._pending.pop(consumed).result()

    def make(self, streams: Sequence[Stream], learner: Learner | None = None, started: float | None = None) -> Step:
        """Plan streams with what is known now, or with what `learner` knew."""
        started = time.perf_counter() if started is None else started
        learner = learner or self.learner
        model = learner.model
        found = pieces_of(streams)
        fits = most_tokens(learner.cluster, model)
        pieces = tuple(piece for piece in found if piece.length <= fits)
        made = None
        if pieces:
            lengths = [piece.length for piece in pieces]
            continued = [index for index, piece in enumerate(pieces) if piece.position]
            made = plan(lengths, learner.cluster, model, self.config.budget, pod_ranks=self.pod_ranks, apart=continued)
        return Step(
            streams,
            pieces,
            tuple(piece for piece in found if piece.length > fits),
            made,
            sum(float(stream.weights.sum()) for stream in streams),
            time.perf_counter() - started,
        )

    def learn(self, step: Step, seconds: Sequence[float], equal_work: Sequence[float]) -> None:
        """Take in the time of each micro-batch, and of the same work on each rank; both already alike on all ranks."""
        assert step.plan is not None
        samples = []
        for batch, measured in zip(step.plan.micro_batches, seconds, strict=True):
            slowest = max(batch.groups, key=lambda group: group.time)
            lengths = tuple(step.pieces[index].length for index in slowest.documents)
            samples.append(Sample(lengths, slowest.degree, measured, slowest.ranks.start, slowest.cuts))
        self.learner = self.learner.paced(equal_work).update(samples)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: all that the plans of later steps depend on, besides configuration and data."""
        older = [replace(each, rows=()) for each in self._begun[-self.config.ahead :]]  # plans read factors alone
        return {
            "for": _digest(self.learner),
            "links": cluster_to_json(self.learner.cluster),
            "learnt": [each.state() for each in (*older, self.learner)],
        }

    def restore(self, state: dict[str, Any] | None) -> bool:
        """Go on with a checkpoint's costs; false, and nothing changes, if they are of another model or number of ranks."""
        first = self.learner
        if state is None or state["for"] != _digest(first):
            return False
        first = replace(first, cluster=cluster_from_json(first.cluster, state["links"]))
        found = [first.restored(each) for each in state["learnt"]]
        *begun, self.learner = found
        missing = self.config.ahead - len(begun)
        self._begun = [*([found[0]] * missing), *begun][-self.config.ahead :]
        return True

    def _start(self, first: int, learner: Learner) -> Future[Step]:
        future: Future[Step] = Future()

        def work() -> None:
            started = time.perf_counter()
            try:
                future.set_result(self.make(self.read(first), learner, started))
            except BaseException as error:  # a user's mistake too is told by whoever waits
                future.set_exception(error)

        threading.Thread(target=work, name=f"plan of sample {first}", daemon=True).start()
        return future


def _digest(learner: Learner) -> str:
    """Of what learnt factors multiply; links may have been measured, and are kept beside them."""
    return hashlib.sha256(f"{learner.cluster.ranks} {learner.base}".encode()).hexdigest()[:16]
