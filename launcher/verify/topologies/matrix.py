"""Which cases are run: the whole list, and a spread of it in which every value of every axis takes part.

Modes that multiply the list without need (recomputation, engines, what else is on) go round from case to case.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from longhaul.models.errors import UserError

from .cases import ADAMW, BACKENDS, CHECKPOINTING, ENGINES, SCHEDULES, TOPOLOGIES, Case
from .models import ENCODER, MODELS, MOE

EXPERTS = tuple(name for name in TOPOLOGIES if "ep2" in name and "pp2" not in name)
PIPELINES = tuple(name for name in TOPOLOGIES if "pp2" in name and "ep2" not in name)
PLAIN = tuple(name for name in TOPOLOGIES if "pp2" not in name and "ep2" not in name)
ZERO = tuple(name for name in BACKENDS if name.startswith("zero"))
KINDS = SCHEDULES[:3]
CAUSAL = tuple(name for name in ENGINES if name != "rsa")
BOTH_WAYS = ("rsa", "gathered", "rsa", "zigzag", "rsa", "levels", "rsa", "ulysses")  # engines of a model that looks both ways


class Narrowing(NamedTuple):
    """What the user asked for; an empty tuple is everything."""

    model: tuple[str, ...] = ()
    topology: tuple[str, ...] = ()
    backend: tuple[str, ...] = ()


def backends_of(topology: str) -> list[str]:
    """Ways to hold less that a mesh has a use for."""
    degrees = TOPOLOGIES[topology]
    sharing = degrees.data * degrees.sequence
    if sharing == 1:
        return ["fsdp"]  # nothing is shared: they are one
    found = ["ddp", "fsdp"]
    if degrees.data == degrees.sequence == 2 and degrees.expert == 1:
        found.append("hsdp")
    if degrees.tensor == degrees.pipeline == degrees.expert == 1:
        found += [name for name in ZERO if name != "zero3_offload" or sharing == 4]
    return found


def whole() -> list[Case]:
    """The whole list, refusals included."""
    cases: list[Case] = []
    for number, model in enumerate(MODELS):
        # Another start for every model, so that over models all meet.
        turn, stages, modes, engines = (itertools.count(start) for start in (number, number, 3 * number, 2 * number))
        topologies = (*PLAIN, *(PIPELINES if model != ENCODER else ()), *(EXPERTS if model == MOE else ()))
        for topology in topologies:
            for backend, schedule in _ways(topology, turn, stages):
                engine = "gathered"
                if TOPOLOGIES[topology].sequence > 1:
                    engine = _next(BOTH_WAYS if model == ENCODER else CAUSAL, engines)
                mode = _next(tuple(CHECKPOINTING), modes)
                dtype = "fp32" if backend in ZERO else "fp64"
                cases.append(Case(model, topology, backend, mode, schedule, engine, dtype=dtype))
        cases += _others(model, number)
    return [*cases, *SPREAD, *REFUSED]


def _ways(topology: str, turn: Iterator[int], stages: Iterator[int]) -> Iterator[tuple[str, str]]:
    """Backend and schedule. Along data and sequence all backends that are ours, and the next stage of ZeRO; on a pipeline by
    itself a schedule of each kind, and one more; elsewhere one in turn."""
    degrees, backends = TOPOLOGIES[topology], backends_of(topology)
    zeros, ours = ([name for name in backends if (name in ZERO) == which] for which in (True, False))
    if degrees.pipeline > 1:
        schedules = [KINDS[next(turn) % 3]] if degrees.world_size > 2 else [*KINDS, _next(SCHEDULES[3:], turn)]
        for schedule in schedules:
            yield _next(ours, turn), schedule
    elif zeros and topology != "sp4":
        yield from ((name, "") for name in (*ours, _next(ZERO[:3], stages)))
    else:
        yield _next(backends, turn), ""


def _next(values: Sequence[str], turn: Iterator[int]) -> str:
    return values[next(turn) % len(values)]


def _others(model: str, number: int) -> Iterator[Case]:
    """AdamW, float32, streams in chunks, planned steps."""
    served = [*PLAIN[1:], *(PIPELINES if model != ENCODER else ()), *(EXPERTS if model == MOE else ())]
    for topology in served:
        backends = [name for name in backends_of(topology) if name not in ZERO]
        schedule = SCHEDULES[number % 4] if TOPOLOGIES[topology].pipeline > 1 else ""
        if model == "hybrid" or topology in EXPERTS:
            yield Case(model, topology, backends[-1], schedule=schedule, optimizer=ADAMW)
        if model in ("mamba2", ENCODER) or topology in EXPERTS:
            yield Case(model, topology, backends[0], "full", schedule, dtype="fp32")
    if model == ENCODER:
        return
    exact = "fp32" if model in ("mom", MOE) else "fp64"  # what documents count in a balance loss is float32
    for topology, backend in (("1", "fsdp"), ("sp2", "ddp"), ("dp2", "fsdp"), ("dp2 x sp2", "zero2"), ("dp2 x sp2", "zero3")):
        if backend == "zero3" or (backend == "fsdp") == (number % 2 == 0):
            yield Case(model, topology, backend, option="streamed", dtype="fp32" if backend in ZERO else exact)
    if number % 3 == 0:
        yield Case(model, "dp2 x tp2", "fsdp", option="planned")
    if number % 3 == 1:
        yield Case(model, "dp2", "ddp", "selective", option="planned")


# What must be refused before the first step.
REFUSED = [
    case._replace(refused=True)
    for case in (
        Case("linear_attention", "pp2", schedule="1f1b", option="streamed"),
        Case("linear_attention", "pp2", schedule="1f1b", option="planned"),
        Case("linear_attention", "pp2", schedule="1f1b", option="carried"),
        Case("linear_attention", "pp2 x sp2", "zero1", schedule="1f1b", dtype="fp32"),
        Case("linear_attention", "tp2 x sp2", "zero1", dtype="fp32"),
        Case("linear_attention", "tp2", option="carried"),
        Case("linear_attention", "dp2", option="carried"),
        Case("linear_attention", "sp2", "hsdp"),
        Case("linear_attention", "sp2", option="planned"),
        Case("linear_attention", "dp2", "zero1", option="planned", dtype="fp32"),
        Case("linear_attention", "dp2", engines="levels", option="planned"),
        Case("linear_attention", "ep2 x sp2"),
        Case(MOE, "pp2 x ep2 x sp2", schedule="1f1b"),
        Case(MOE, "ep2 x sp2", "zero1", dtype="fp32"),
        Case(ENCODER, "pp2", schedule="1f1b"),
        Case(ENCODER, "sp2", option="streamed"),
    )
]

# In the tests, and without --all: every model, mesh, backend, schedule, engine and mode of recomputation.
SPREAD = [
    Case("linear_attention", "dp2 x tp2 x sp2", "hsdp", "full", "", "ring"),
    Case("linear_attention", "pp2", "fsdp", "none", "zbv_zero_bubble"),
    Case("linear_attention", "dp2", "zero1", "none", dtype="fp32"),
    Case("mamba2", "pp2 x dp2 x sp2", "ddp", "selective", "interleaved_1f1b"),
    Case("mamba2", "sp2", "zero3", "full", dtype="fp32"),
    Case("mamba2", "tp2 x sp2", "ddp", "none", "", "zigzag"),
    Case("gated_deltanet", "pp2 x tp2 x sp2", "fsdp", "full_offload", "interleaved_zero_bubble", "ulysses"),
    Case("gated_deltanet", "dp2", "ddp", "selective", option="planned"),
    Case("gated_deltanet", "tp2", "fsdp", "full_offload"),
    Case("mom", "dp2 x sp2", "hsdp", "none", "", "zigzag"),
    Case("mom", "pp2 x sp2", "fsdp", "full", "gpipe"),
    Case("memmamba", "sp4", "fsdp", "selective", "", "levels"),
    Case("memmamba", "sp2", "zero2", dtype="fp32"),
    Case("memmamba", "pp2", "fsdp", "full", "looped_bfs"),
    Case("hybrid", "dp2 x sp2", "zero3_offload", "selective", "", "ring", dtype="fp32"),
    Case("hybrid", "pp2 x dp2 x sp2", "hsdp", "none", "1f1b", "ring", optimizer=ADAMW),
    Case("hybrid", "dp2 x tp2", "ddp", "full", optimizer=ADAMW),
    Case("hybrid", "dp2", "fsdp", option="streamed"),
    Case("hybrid", "pp2", "fsdp", "none", "dualpipev"),
    Case(MOE, "ep2 x sp2", "fsdp", "full"),
    Case(MOE, "dp2 x ep2 x sp2", "ddp", "none", optimizer=ADAMW),
    Case(MOE, "ep2 x tp2 x sp2", "fsdp", "selective", dtype="fp32"),
    Case(MOE, "dp2 x ep2", "fsdp", "none"),
    Case(MOE, "dp2 x ep2", option="planned", dtype="fp32"),
    Case(ENCODER, "sp2", "ddp", "selective", "", "rsa"),
    Case(ENCODER, "dp2 x tp2 x sp2", "fsdp", "full", "", "rsa"),
    Case(ENCODER, "1", "fsdp", "full"),
]


def spread() -> list[Case]:
    """A few cases in which every value of every axis is met, and every refusal."""
    return [*SPREAD, *REFUSED]


def have_deepspeed() -> bool:
    """Whether ZeRO can be run here."""
    return importlib.util.find_spec("deepspeed") is not None


def chosen(cases: Iterable[Case], narrowing: Narrowing) -> list[Case]:
    """Those of the cases that the user asked for, sorted: world size by world size, neighbours sharing their reference."""
    for name, known in (("model", MODELS), ("topology", tuple(TOPOLOGIES)), ("backend", tuple(BACKENDS))):
        for value in getattr(narrowing, name):
            if value not in known:
                raise UserError(f"--{name} {value!r} is not known: choose from {', '.join(known)}.")
    wanted = [
        case
        for case in dict.fromkeys(cases)
        if all(getattr(case, name) in getattr(narrowing, name) or not getattr(narrowing, name) for name in Narrowing._fields)
    ]
    return sorted(wanted, key=lambda case: (case.ranks, case.reference))
