"""Cases: one run of the trainer each, as words.

Legend: dp, sp, tp, pp, ep processes along data, sequence, tensor, pipeline and expert axes.
"""

from __future__ import annotations

from typing import NamedTuple

from longhaul.parallel.mesh import Degrees

SGD, ADAMW = "sgd", "adamw"
TOPOLOGIES: dict[str, Degrees] = {
    "1": Degrees(),
    "sp2": Degrees(sequence=2),
    "tp2": Degrees(tensor=2),
    "pp2": Degrees(pipeline=2),
    "dp2": Degrees(data=2),
    "sp4": Degrees(sequence=4),
    "tp2 x sp2": Degrees(tensor=2, sequence=2),
    "pp2 x sp2": Degrees(pipeline=2, sequence=2),
    "dp2 x sp2": Degrees(data=2, sequence=2),
    "dp2 x tp2": Degrees(data=2, tensor=2),
    "ep2 x sp2": Degrees(expert=2, sequence=2),
    "dp2 x ep2": Degrees(data=2, expert=2),
    "dp2 x ep2 x sp2": Degrees(data=2, expert=2, sequence=2),
    "ep2 x tp2 x sp2": Degrees(expert=2, tensor=2, sequence=2),
    "pp2 x ep2 x sp2": Degrees(pipeline=2, expert=2, sequence=2),
    "dp2 x tp2 x sp2": Degrees(data=2, tensor=2, sequence=2),
    "pp2 x tp2 x sp2": Degrees(pipeline=2, tensor=2, sequence=2),
    "pp2 x dp2 x sp2": Degrees(pipeline=2, data=2, sequence=2),
}
# Name -> keys of `parallel`.
BACKENDS: dict[str, dict[str, object]] = {
    "ddp": {"data_parallel_backend": "ddp"},
    "fsdp": {"data_parallel_backend": "fsdp"},
    "hsdp": {"data_parallel_backend": "fsdp", "data_parallel_replicate_size": 2},
    "zero1": {"data_parallel_backend": "deepspeed", "zero_stage": 1},
    "zero2": {"data_parallel_backend": "deepspeed", "zero_stage": 2},
    "zero3": {"data_parallel_backend": "deepspeed", "zero_stage": 3},
    "zero3_offload": {"data_parallel_backend": "deepspeed", "zero_stage": 3, "zero_offload": True},
}
# Name -> keys of `train`.
CHECKPOINTING: dict[str, dict[str, object]] = {
    "none": {"activation_checkpointing": "none"},
    "selective": {"activation_checkpointing": "selective"},
    "full": {"activation_checkpointing": "full"},
    "full_offload": {"activation_checkpointing": "full", "activation_offload": True},
}
SCHEDULES = ("1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble", "gpipe", "looped_bfs", "dualpipev")
# Name -> keys of `parallel`: exchange, attention, layout.
ENGINES: dict[str, dict[str, object]] = {
    "gathered": {},
    "ring": {"exchange": "ring", "attention": "ring", "layout": "contiguous"},
    "zigzag": {"exchange": "all_scan", "attention": "ring", "layout": "zigzag"},
    "levels": {"exchange": "hierarchical", "attention": "usp", "sequence_inner_size": 2},
    "ulysses": {"exchange": "auto", "attention": "ulysses", "layout": "contiguous_per_document"},
    "rsa": {"attention": "rsa"},
}
# Name -> keys by section: ways to run a step that are off in the reference.
OPTIONS: dict[str, dict[str, dict[str, object]]] = {
    "": {},
    "streamed": {"train": {"stream_tokens": 31}},
    "planned": {"parallel": {"planner": {"enabled": True, "memory_tokens": 101, "learn": False}}},
    "carried": {"data": {"carry_state": True, "prefix_length": 0}},
}


class Case(NamedTuple):
    """One run of the trainer.

    Attributes:
        model: a name of `models.MODELS`.
        topology, backend, checkpointing, engines, option: names of the tables above.
        schedule: of the pipeline; empty without one.
        optimizer: plain SGD, or AdamW with a warm-up, a decay and a clipped norm.
        refused: it must be refused before the first step.
    """

    model: str
    topology: str = "1"
    backend: str = "fsdp"
    checkpointing: str = "none"
    schedule: str = ""
    engines: str = "gathered"
    option: str = ""
    optimizer: str = SGD
    dtype: str = "fp64"
    refused: bool = False

    @property
    def degrees(self) -> Degrees:
        """The mesh, without copies."""
        return TOPOLOGIES[self.topology]

    @property
    def ranks(self) -> int:
        """Processes."""
        return self.degrees.world_size

    @property
    def streams(self) -> int:
        """Of a step: two for each data-parallel group, so that gradients are added up over micro-batches everywhere."""
        return (4 if self.schedule == "dualpipev" else 2) * self.degrees.data

    @property
    def reference(self) -> tuple[str, ...]:
        """Cases alike in this share the run in one process that they are compared with."""
        return self.model, self.dtype, self.optimizer, str(self.streams)

    @property
    def key(self) -> str:
        """As the results file and messages name it."""
        shown = (self.schedule, self.option, self.engines.replace("gathered", ""), self.checkpointing.replace("none", ""))
        words = [self.model, self.topology, self.backend, *shown, self.optimizer.replace(SGD, ""), self.dtype]
        return ", ".join(word for word in words if word) + (" (refused)" if self.refused else "")
