"""What blocks hold in a step, measured: short stacks of them, run as one process of the run would, at short lengths.

A block more costs what it keeps until the backward; what is left of a stack is what comes and goes. Both grow linearly with the
tokens held here, because every op runs in chunks, and with the tokens of the stream, where keys and values of others are held.
The other processes are pretended: gathered tensors have their sizes, and nothing is sent.

Letters: T tokens of a stream, C of a chunk of it (all, if it is not streamed), P processes of a sequence.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from longhaul.launcher.config import TrainConfig
from longhaul.launcher.engines import engine_arguments
from longhaul.models.lm import Between, LanguageModel, LossOutput
from longhaul.models.ops.cross_entropy.chunk import MAX_LOGITS_BYTES
from longhaul.models.ops.segments import Documents
from longhaul.models.streaming import LongStream, Streaming
from longhaul.parallel.engine import SequenceParallel
from longhaul.parallel.expert import ExpertParallel
from longhaul.parallel.mesh import Degrees
from longhaul.parallel.pipeline.order import backward_of_input
from longhaul.parallel.pretended import PretendedComm
from longhaul.parallel.tensor import TensorParallel

from .allocations import recorded

SHORT, LONG = 512, 1024  # tokens held here, of the measured steps
FIRST, MIDDLE, LAST = "first", "middle", "last"
"""Where in the model a stack is: with the embedding, with neither end, with norm and head."""


class Held(NamedTuple):
    """Bytes of a stack's step, parameters and their gradients not counted."""

    forward: float
    """After the forward."""
    peak: float
    """The most until the end of the backward."""
    half_peak: float
    """The most until the input's gradient is there, where weights have theirs later."""
    half: float
    """From then until the weights have theirs."""


class Kept(NamedTuple):
    """Bytes that one stream keeps, after its forward and between the halves of its backward."""

    forward: float
    half_peak: float
    half: float


class Stacks:
    """Stacks of blocks of a run's model on one of its processes.

    Args:
        config: the run.
        degrees: its processes along each axis.
        halves: the schedule splits backwards.
    """

    def __init__(self, config: TrainConfig, degrees: Degrees, halves: bool = False) -> None:
        self.config, self.degrees, self.halves = config, degrees, halves
        self._found: dict[tuple[str, str, int, int], Held] = {}
        chunk = config.train.stream_tokens
        length = config.data.seq_length
        self.streamed = chunk is not None and chunk < length
        self.sizes = (-(-min(length, chunk or length) // degrees.sequence), -(-length // degrees.sequence))
        """Tokens held here, of a chunk and of the stream."""

    def kept(self, letter: str) -> Kept:
        """By a block of this letter."""
        one, two = (self._at(letter * blocks, MIDDLE) for blocks in (1, 2))
        forward = two.peak - one.peak if self.streamed else two.forward - one.forward
        return Kept(max(forward, 0.0), max(two.half_peak - one.half_peak, 0.0), max(two.half - one.half, 0.0))

    def kept_beside(self, letter: str, place: str) -> Kept:
        """By a stage beside its blocks: what enters and leaves it, and what the head keeps."""
        if self.streamed:
            return Kept(0.0, 0.0, 0.0)
        found, block = self._at(letter, place), self.kept(letter)
        return Kept(*(max(held - of_block, 0.0) for held, of_block in zip((found.forward, found.half_peak, found.half), block)))

    def passing(self, letter: str, place: str) -> float:
        """Bytes that come and go beside what is kept: one block's, and the end's if the stack is at one."""
        return max(self._at(letter, place).peak - self.kept(letter).forward - self.kept_beside(letter, place).forward, 0.0)

    def _at(self, letters: str, place: str) -> Held:
        """A stack at the run's lengths, carried on from short ones."""
        chunk, stream = self.sizes
        if self.streamed:
            sizes = (SHORT, 2 * SHORT), (LONG, 2 * LONG), (SHORT, 2 * LONG)
            corner, wide, long = (self._measured(letters, place, *at) for at in sizes)
            steps = (chunk - SHORT) / (LONG - SHORT), (stream - 2 * SHORT) / (2 * (LONG - SHORT))
            found = Held(*(c + (w - g) * steps[0] + (g - c) * steps[1] for c, w, g in zip(corner, wide, long)))
        else:
            short, long = (self._measured(letters, place, tokens, tokens) for tokens in (SHORT, LONG))
            found = Held(*(a + (b - a) * (chunk - SHORT) / (LONG - SHORT) for a, b in zip(short, long)))
        if place == LAST or self.streamed:  # logits exist for a bounded number of tokens at once: beyond it they do not grow
            row = 4 * self.config.model.vocab_size // self.degrees.tensor
            most = MAX_LOGITS_BYTES // row
            if chunk > most > LONG:
                found = found._replace(peak=max(found.peak - row * (chunk - most), found.forward))
        return found

    def _measured(self, letters: str, place: str, chunk: int, stream: int) -> Held:
        key = letters, place, chunk, stream
        if key not in self._found:
            self._found[key] = self._measure(*key)
        return self._found[key]

    def _measure(self, letters: str, place: str, chunk: int, stream: int) -> Held:
        first, last = place == FIRST or self.streamed, place == LAST or self.streamed
        pattern = ("" if first else letters[0]) + letters + ("" if last else letters[0])
        model = LanguageModel(replace(self.config.model, pattern=pattern, num_layers=len(pattern)))
        layers = range(0 if first else 1, len(pattern) - (0 if last else 1))
        model.keep([layers])
        model.activation_checkpointing = self.config.train.activation_checkpointing
        TensorParallel(model, PretendedComm(self.degrees.tensor))
        ExpertParallel(model, PretendedComm(self.degrees.expert), PretendedComm(1))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        ranks = self.degrees.sequence
        tokens = torch.randint(self.config.model.vocab_size, (stream * ranks,))
        bf16 = torch.autocast("cpu", torch.bfloat16, enabled=self.config.train.precision != "fp32")
        if self.streamed:
            driver = Streaming(model, chunk * ranks, lambda documents, on: self.engine.shard(documents, "cpu", on), keep="cpu")
            whole = LongStream(tokens, tokens, torch.ones(len(tokens)), Documents((0, len(tokens))))
            with recorded() as all_of_it, bf16:
                driver.backward(whole)
            return Held(0.0, all_of_it.peak, 0.0, 0.0)
        shard = self.engine.shard(Documents((0, len(tokens))), "cpu")
        own = tokens[: shard.num_tokens]

        def forward() -> tuple[list[Tensor], list[Tensor]]:
            """What enters, and the roots of the backward."""
            shapes = [] if first else model.between_shapes(shard, layers.start)
            # Random, so that a router spreads it over its experts; pools hold positions, too.
            make = [torch.randn, *[torch.zeros] * (len(shapes) - 1)]
            entering = [new(shape, requires_grad=True) for new, shape in zip(make, shapes)]
            before = Between(entering[0], tuple(entering[1:])) if entering else None
            with bf16:
                out = model(own, shard, labels=own, layers=layers, entering=before)
            if isinstance(out, LossOutput):
                return entering, [out.loss_sum]
            return entering, [root for root in (out.x, *out.memory, out.aux_sum) if root is not None and root.requires_grad]

        with recorded() as of_forward:
            entering, roots = forward()
        with recorded() as of_backward:
            torch.autograd.backward(roots, [torch.zeros_like(root) for root in roots])
        del entering, roots
        half_peak = half = 0
        if self.halves and not first:
            with recorded() as of_half:
                entering, roots = forward()
                needed = backward_of_input(roots, [torch.zeros_like(root) for root in roots], entering, model.parameters())
                del roots
            half_peak, half = of_half.peak, of_half.left
            del needed
        return Held(of_forward.left, max(of_forward.peak, of_forward.left + of_backward.peak), half_peak, half)

    @cached_property
    def engine(self) -> SequenceParallel:
        """Of the last process of a sequence, which reads most, among pretended ones."""
        parallel = self.config.parallel
        if parallel.exchange == "auto":
            parallel = replace(parallel, exchange="all_gather", auto_latency=None, auto_bandwidth=None, auto_local_time=None)
        ranks = self.degrees.sequence
        inner = parallel.sequence_inner_size or ranks
        return SequenceParallel(
            PretendedComm(ranks, ranks - 1),
            **engine_arguments(parallel),
            tensor=PretendedComm(self.degrees.tensor),
            levels=(PretendedComm(inner, inner - 1), PretendedComm(ranks // inner, ranks // inner - 1)),
        )
