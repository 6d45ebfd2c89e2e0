"""What one process of a run will hold at its peak, before the run: `longhaul plan memory`.

Parameters, gradients and optimizer states are counted on a model that is cut as the process's own, but has no memory. What blocks
keep, and what comes and goes beside them, is measured on short stacks (`stacks.py`). The peak is then looked for along the
process's step: forwards and backwards of its stages in their order, in each backward block by block, where activations go and
gradients come.

Letters: N parameters, P processes that share them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from longhaul.launcher.config import TrainConfig
from longhaul.launcher.metrics.hardware import peak_resident_gib
from longhaul.launcher.pipelined import stages_per_rank
from longhaul.models.lm import LanguageModel
from longhaul.parallel.deepspeed import BUCKET
from longhaul.parallel.expert import ExpertParallel
from longhaul.parallel.mesh import Degrees
from longhaul.parallel.pipeline.layers import PipelineParallel
from longhaul.parallel.pipeline.order import BACKWARD, FORWARD, INPUT, WEIGHT, Action, order
from longhaul.parallel.pretended import PretendedComm
from longhaul.parallel.tensor import TensorParallel

from .allocations import settled
from .stacks import FIRST, LAST, MIDDLE, Kept, Stacks

GIB = 2**30
PROCESS = "Python and torch"
SPLITTING = ("interleaved_zero_bubble", "zbv_zero_bubble", "dualpipev")  # schedules that run backwards in halves
LIVE = 10**9  # parameters that ZeRO-3 leaves gathered, its own choice
SIZE = 4  # bytes of a parameter, of its gradient, and of each of its optimizer states


@dataclass(frozen=True)
class Part:
    """One line of a prediction."""

    name: str
    bytes: float
    how: str


class Count(NamedTuple):
    """Parameters by how they are shared: experts are alike on fewer processes."""

    usual: int = 0
    experts: int = 0

    @property
    def both(self) -> int:
        """All of them."""
        return self.usual + self.experts


class Layer(NamedTuple):
    """A block of this process: its letter, its parameters, and bytes it keeps of one stream for the backward."""

    letter: str
    parameters: Count
    kept: Kept


class Stage(NamedTuple):
    """Consecutive blocks, and what of the ends is with them."""

    layers: list[Layer]
    embedding: int
    head: int
    beside: Kept

    @property
    def kept(self) -> Kept:
        """Bytes, of one stream."""
        return Kept(*(sum(values) for values in zip(self.beside, *(layer.kept for layer in self.layers))))

    @property
    def parameters(self) -> int:
        """With those of the ends."""
        return sum(layer.parameters.both for layer in self.layers) + self.embedding + self.head


class Moment(NamedTuple):
    """Bytes at one time of a step."""

    gradients: float = 0.0
    activations: float = 0.0
    passing: float = 0.0
    alive: int = 0
    """Streams of which something is kept."""

    @property
    def total(self) -> float:
        return self.gradients + self.activations + self.passing


def predict(config: TrainConfig, world_size: int) -> list[Part]:
    """What the process that holds most holds at its peak, part by part.

    Raises:
        UserError: the run is impossible.
    """
    return max(predict_each(config, world_size), key=total)


def total(parts: Iterable[Part]) -> float:
    """Bytes of all parts."""
    return sum(part.bytes for part in parts)


@settled()
def predict_each(config: TrainConfig, world_size: int) -> list[list[Part]]:
    """The same for every place in a pipeline; a run without one has one place."""
    config = config.resolve(world_size)
    degrees = config.parallel.degrees(world_size)
    stacks = Stacks(config, degrees, halves=degrees.pipeline > 1 and config.parallel.pipeline_schedule in SPLITTING)
    return [_predict(config, degrees, place, stacks) for place in range(degrees.pipeline)]


def _predict(config: TrainConfig, degrees: Degrees, place: int, stacks: Stacks) -> list[Part]:
    parallel, train = config.parallel, config.train
    stages, actions, count = _held(config, degrees, place, stacks)
    sharing = degrees.data * degrees.sequence // degrees.replicate
    shares = Count(sharing, max(1, degrees.data * degrees.sequence // degrees.expert))
    sharded = parallel.data_parallel_backend == "fsdp" and degrees.data * degrees.sequence > 1
    held = count.usual / shares.usual + count.experts / shares.experts if sharded else float(count.both)
    moments = 2 if config.optimizer.name == "adamw" else 0
    zero = parallel.zero_stage if parallel.data_parallel_backend == "deepspeed" else 0
    share = 1.0  # of a gradient, what stays after its backward
    several = sum(action.kind == FORWARD for action in actions) > len(stages)
    if zero:
        held = count.both / (sharing if zero == 3 else 1)
        share = 1.0 if zero == 1 else 1 / sharing
    kept = f"{count.both:,}" if held == count.both else f"{held:,.0f} of {count.both:,}"
    parts = [Part("parameters", SIZE * held, f"{kept}, fp32")]
    if zero:
        steps = "steps on the CPU" if parallel.zero_offload else "its moments, and the weights it steps"
        on_the_host = parallel.zero_offload and _device(config) == "cuda"
        parts.append(Part("optimizer", 0.0 if on_the_host else SIZE * (moments + 1) * count.both / sharing, steps))
        parts.append(Part("buffers", SIZE * min(BUCKET, count.both), "of DeepSpeed's messages"))
        if zero == 3:
            parts.append(Part("gathered", SIZE * min(LIVE, count.both), "parameters that DeepSpeed lets live at once"))
    else:
        parts.append(Part("optimizer", SIZE * moments * held, f"{moments} of the same"))
    if sharded and degrees.pipeline > 1:
        parts.append(Part("gathered", SIZE * count.both, "all parameters, for the whole step"))
    elif sharded:
        blocks = [layer.parameters.both for stage in stages.values() for layer in stage.layers]
        outside, largest = count.both - sum(blocks), max(blocks, default=0)
        parts.append(Part("gathered", SIZE * (2.0 * outside + 3.0 * largest), "outside of blocks, and a block, with gradients"))
        share = 1.0 if several else held / count.both
    moment = _peak(stages, actions, stacks, share)
    alive = f"{moment.alive} streams of " if moment.alive > 1 else ""
    parts += [
        Part("gradients", moment.gradients, "that are there by then"),
        Part(
            "activations",
            moment.activations,
            f"of {alive}{stacks.sizes[0]:,} tokens, kept for the backward (train.activation_checkpointing "
            f"{train.activation_checkpointing})",
        ),
        Part("passing", moment.passing, "what comes and goes beside them: a block's, the head's logits"),
    ]
    if _device(config) == "cpu":
        parts.append(Part(PROCESS, peak_resident_gib() * GIB, "of this process, now"))
    return parts


def _held(config: TrainConfig, degrees: Degrees, place: int, stacks: Stacks) -> tuple[dict[int, Stage], list[Action], Count]:
    """Stages of a process, what it does with them in a step, and its parameters."""
    parallel = config.parallel
    with torch.device("meta"):
        model = LanguageModel(config.model)
    spans, own = [range(config.model.num_layers)], [0]
    streams = 1 if parallel.planner.enabled else config.streams_per_group
    chunks = 2 if stacks.streamed else 1  # the second one replayed finds gradients
    actions = [Action(FORWARD, 0), Action(BACKWARD, 0)] * (streams * chunks)
    if degrees.pipeline > 1:
        each = stages_per_rank(config)
        comm = PretendedComm(degrees.pipeline, place)
        how = parallel.pipeline_schedule, each, parallel.pipeline_split, config.data.seq_length
        pipeline = PipelineParallel(model, comm, *how)
        spans, own = pipeline.spans, pipeline.own
        actions = order(parallel.pipeline_schedule, degrees.pipeline, each, streams, place)
    TensorParallel(model, PretendedComm(degrees.tensor))
    experts = set(ExpertParallel(model, PretendedComm(degrees.expert), PretendedComm(1)).kept)
    stages = {}
    for number in own:
        span = spans[number]
        layers = []
        for index in span:
            count = _count(model.layers.get_submodule(str(index)), f"layers.{index}.", experts)
            layers.append(Layer(config.model.layers[index], count, stacks.kept(config.model.layers[index])))
        head = model.head.weight.numel() if span.stop == config.model.num_layers else 0
        tied = bool(head) and config.model.tie_embeddings
        embedding = model.embedding.weight.numel() if span.start == 0 and not tied else 0
        where = LAST if head else FIRST if span.start == 0 else MIDDLE
        stages[number] = Stage(layers, embedding, head, stacks.kept_beside(layers[-1].letter, where))
    return stages, actions, _count(model, "", experts)


def _count(module: nn.Module, prefix: str, experts: set[str]) -> Count:
    named = {prefix + name: parameter.numel() for name, parameter in module.named_parameters()}
    apart = sum(size for name, size in named.items() if name in experts)
    return Count(sum(named.values()) - apart, apart)


def _peak(stages: Mapping[int, Stage], actions: Sequence[Action], stacks: Stacks, share: float) -> Moment:
    """The moment of a step at which most is held.

    Args:
        share: of a parameter's gradient, what stays here after its backward.
    """
    alive: Counter[int] = Counter()
    halves: Counter[int] = Counter()
    gradients: dict[int, float] = dict.fromkeys(stages, 0.0)
    worst = Moment()
    for action in actions:
        stage = stages[action.stage]
        if action.kind == FORWARD:
            alive[action.stage] += 1
            continue
        others = sum(made for number, made in gradients.items() if number != action.stage)
        kept = sum(count * stages[number].kept.forward for number, count in alive.items())
        kept += sum(count * stages[number].kept.half for number, count in halves.items())
        streams = sum(alive.values()) + sum(halves.values())
        if action.kind == INPUT:
            if action.stage:  # the model's first stage has no input's gradient, and does all of it later
                more = max(stage.kept.half_peak - stage.kept.forward, 0.0)
                last = stage.layers[-1].letter, LAST if stage.head else MIDDLE
                moment = Moment(others + gradients[action.stage], kept + more, stacks.passing(*last), streams)
                worst = max(worst, moment, key=lambda moment: moment.total)
                alive[action.stage] -= 1
                halves[action.stage] += 1
            continue
        split = action.kind == WEIGHT and action.stage > 0
        for made, gone, passing in _backward(stage, stacks, share, split):
            own = gradients[action.stage] or made  # of a second stream gradients are added to those that are there
            worst = max(worst, Moment(others + own, kept - gone, passing, streams), key=lambda moment: moment.total)
        gradients[action.stage] = share * stage.parameters * SIZE
        (halves if split else alive)[action.stage] -= 1
    return worst


def _backward(stage: Stage, stacks: Stacks, share: float, split: bool) -> Iterator[tuple[float, float, float]]:
    """Along the backward of one stream, or its second half: gradients made, activations gone, and what comes and goes."""
    made = gone = 0.0
    for layer in reversed(stage.layers):
        at_the_end = layer is stage.layers[-1]
        head = stage.head if at_the_end else 0
        yield made, gone, 0.0 if split else stacks.passing(layer.letter, LAST if head else MIDDLE)
        made += SIZE * share * (layer.parameters.both + head)
        kept = [layer.kept, stage.beside] if at_the_end else [layer.kept]
        gone += sum(each.half if split else each.forward for each in kept)
    if stage.embedding and not split:
        yield made, gone, stacks.passing(stage.layers[0].letter, FIRST)


def _device(config: TrainConfig) -> str:
    return "cuda" if config.train.device == "cuda" or (config.train.device == "auto" and torch.cuda.is_available()) else "cpu"
