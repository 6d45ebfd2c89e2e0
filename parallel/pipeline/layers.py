"""A model of which this process keeps some stages of layers, and what its parameters ask for once a step.

Letters: p processes of a pipeline, T' tokens this process answers for between layers, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.distributed.tensor import DTensor

from longhaul.models.errors import UserError
from longhaul.models.lm import LanguageModel
from longhaul.parallel.comm import Comm

from .stages import SCHEDULES, owners, split_by_cost, split_by_hand

EMBEDDING = "embedding.weight"


class PipelineParallel:
    """A model narrowed, in place, to the stages of one process.

    Args:
        model: whole and alike on every process; before tensor parallelism cuts heads and data parallelism shards.
        comm: the pipeline group.
        schedule: by name (`SCHEDULES`).
        stages_per_rank: stages of each process.
        split: layers of each stage; cut by cost if None.
        seq_length: tokens of a stream, by which attention is priced.
        costs: of each layer, and of the head; FLOPs if None.

    Raises:
        UserError: there are fewer layers than stages, or `split` does not fit.
    """

    def __init__(
        self,
        model: LanguageModel,
        comm: Comm,
        schedule: str = "1f1b",
        stages_per_rank: int = 1,
        split: Sequence[int] | None = None,
        seq_length: int = 1,
        costs: tuple[Sequence[float], float] | None = None,
    ) -> None:
        self.model, self.comm, self.schedule = model, comm, schedule
        if not hasattr(model, "keep"):
            raise UserError(
                f"A model of class {type(model).__name__} is not cut between layers: leave parallel.pipeline_parallel_size at 1, "
                f"not {comm.size}."
            )
        count, layers = comm.size * stages_per_rank, model.config.num_layers
        if count > layers:
            raise UserError(
                f"A pipeline of {comm.size} processes with {stages_per_rank} stages each needs {count} layers, but "
                f"model.num_layers is {layers}: lower parallel.pipeline_parallel_size or pipeline_stages_per_rank."
            )
        self._unit = "FLOPs" if costs is None else "measured time"
        if costs is None:
            flops = [float(layer.flops_per_token(seq_length)) for layer in model.layers]  # type: ignore[operator]
            costs = flops, 2.0 * model.config.vocab_size * model.config.hidden_size
        each, head = costs
        self.spans = split_by_cost(each, count, head) if split is None else split_by_hand(split, count, layers)
        """Layers of each stage."""
        self.owners = owners(count, comm.size, SCHEDULES[schedule].folded)
        """The process of each stage."""
        self.own = [stage for stage, owner in enumerate(self.owners) if owner == comm.rank]
        """Stages of this process."""
        total = sum(each) + head
        self._shares = [(sum(each[span.start : span.stop]) + head * (span.stop == layers)) / total for span in self.spans]
        model.keep([self.spans[stage] for stage in self.own])
        self._twin: int | None = None
        """The process with the other copy of a tied embedding, where there is one."""
        if model.config.tie_embeddings and self.owners[0] != self.owners[-1]:
            self._twin = {self.owners[0]: self.owners[-1], self.owners[-1]: self.owners[0]}.get(comm.rank)

    def describe(self) -> list[str]:
        """Where layers are, line by line."""
        pattern = self.model.config.layers
        return [
            f"pipeline {self.schedule}, stage {stage} on process {owner} of each pipeline: layers {span.start} to "
            f"{span.stop - 1} ({pattern[span.start : span.stop]}), {share:.0%} of the {self._unit}"
            for stage, (span, owner, share) in enumerate(zip(self.spans, self.owners, self._shares))
        ]

    def counts(self, name: str) -> bool:
        """Whether this process counts a parameter in sums over the pipeline: of two copies only the first stage's."""
        return not (self._twin is not None and name == EMBEDDING and self.comm.rank != self.owners[0])

    def sum_tied_gradients(self) -> None:
        """Add up the gradients of the two copies of a tied embedding; once a step, before they are read."""
        if self._twin is None:
            return
        gradient = self.model.embedding.weight.grad
        assert gradient is not None, "a tied embedding without a gradient"
        local: Tensor = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        other = local.new_empty(local.shape)
        self.comm.exchange([(self._twin, local.clone())], [(self._twin, other)], "tied embedding").wait()
        local += other  # a + b is b + a to the last bit, so the copies stay equal
