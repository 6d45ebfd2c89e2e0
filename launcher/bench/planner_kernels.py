"""What `bench planner` emulates with: lengths of Python's sources, and kernels timed alone, within a budget of time.

Legend: n tokens of a document, d ranks of a group.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from longhaul.launcher.config import TrainConfig
from longhaul.launcher.data import open_corpus
from longhaul.launcher.data.packing import shuffled
from longhaul.launcher.plan.calibrate import Timed
from longhaul.models.block import Block
from longhaul.models.config import ModelConfig
from longhaul.models.errors import UserError
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import KVState, WholeSequence

STEPS_OF_OCTAVE = (16, 19, 23, 27)  # times a power of two, so that halves of a length of the grid are on it
BYTES_A_TOKEN = 3.6
LONG = 1.0  # seconds; a kernel that takes longer needs no run to warm up
SHORT = 0.05  # seconds; shorter kernels are run until all runs together took so long, or until
MANY = 10  # of them were


def grid(longest: int) -> list[int]:
    """Lengths from 128 tokens up."""
    return [step << power for power in range(3, 30) for step in STEPS_OF_OCTAVE if step << power <= longest]


def lengths_of(steps: int, documents: int, longest: int, seed: int) -> list[list[int]]:
    """Lengths of the documents of each step, on the grid; longer documents are left out, as a context limit does."""
    found = []
    allowed = grid(longest)
    tokens = open_corpus(()).lengths
    for index in shuffled(len(tokens), seed, 0):
        scaled = tokens[index] / BYTES_A_TOKEN
        fitting = [length for length in allowed if length >= scaled]
        if fitting:
            found.append(fitting[0])
    if len(found) < steps * documents:
        raise UserError(
            f"Python's sources here have {len(found)} documents of at most {longest} tokens, but --steps {steps} need "
            f"{steps * documents}: lower --steps or --documents."
        )
    return [found[step * documents : (step + 1) * documents] for step in range(steps)]


class Budget:
    """Time of the whole bench: what is under way, what it will take, and a refusal of what would take too long."""

    def __init__(self, minutes: float, say: Callable[[str], None]) -> None:
        self.minutes, self.say = minutes, say
        self.start = self._said = time.perf_counter()

    @property
    def spent(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self.start

    def take(self, seconds: float, what: str) -> None:
        """Say what comes and how long it takes.

        Raises:
            UserError: that is more than is left.
        """
        if self.spent + seconds > 60 * self.minutes:
            raise UserError(
                f"{what} would take {seconds:.0f} s more after {self.spent:.0f} s, but --minutes is {self.minutes:g}: raise it, "
                "or lower --steps, --documents, --width or --pace."
            )
        self.say(f"{what}: about {seconds:.0f} s more after {self.spent:.0f} s")

    def note(self, what: str) -> None:
        """Say something now and then, that nobody may think that nothing happens."""
        if time.perf_counter() - self._said > 10.0:
            self._said = time.perf_counter()
            self.say(f"{what}, after {self.spent:.0f} s")


class KernelClock:
    """Least of some runs, after one that is not counted unless the kernel is long."""

    def __init__(self, budget: Budget, repeats: int) -> None:
        self.budget, self.repeats = budget, repeats
        self._expected: dict[str, tuple[int, float]] = {}  # by name: tokens and seconds of the last kernel

    def __call__(self, name: str, tokens: int, run: Callable[[], None]) -> float:
        before, seconds = self._expected.get(name, (tokens, 0.0))
        if tokens > before and seconds > LONG:
            # Work grows at most with the square: a machine too slow for these lengths is told so, not waited for.
            self.budget.take(seconds * (tokens / before) ** 2, f"timing {name} at {tokens:,} tokens")
        else:
            self.budget.note(f"timing {name} at {tokens:,} tokens")
        found: list[float] = []
        while len(found) <= self.repeats or (sum(found) < SHORT and len(found) < MANY):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
            if found[-1] > LONG:
                break
        seconds = min(found[1:] or found)
        self._expected[name] = tokens, seconds
        return seconds


class KernelTimes(dict[tuple[str, int, int], float]):
    """By letter of a layer (or the head), n and d: seconds on a rank of a group, one call's overhead left out.

    Times of softmax layers are taken when they are first asked for. A linear layer and the head run on n / d tokens; a softmax
    layer on the first and the last of the document's 2d chunks, which is a rank's share of its work, whatever engine divides it.

    Args:
        whole: times of whole documents, and of the lengths that ranks hold of them.
        letters: of the mixers in `whole`.
        overhead: seconds of each letter for one token.
    """

    def __init__(self, config: TrainConfig, whole: Sequence[Timed], letters: dict[str, str], overhead: dict[str, float],
                 clock: KernelClock) -> None:  # fmt: skip
        super().__init__()
        self.alone = {(letters[each.mixer], each.tokens): each.seconds for each in whole}
        self.overhead, self.clock, self.config = overhead, clock, config
        self.chunks = _Chunks(config.model, clock) if "N" in letters.values() else None

    def __missing__(self, key: tuple[str, int, int]) -> float:
        letter, tokens, degree = key
        if letter == "N" and self.chunks is not None and degree > 1:
            seconds = self.chunks.seconds(tokens, degree) - 2 * self.overhead[letter]
        else:
            seconds = self.alone[letter, tokens // degree] - self.overhead[letter]
        self[key] = max(0.0, seconds)
        return self[key]

    def linear_work(self) -> float:
        """Seconds that a token of a layer takes without what grows with length: that of short documents, the least of some."""
        letter = "N" if self.chunks is not None else "L"
        short = sorted(tokens for each, tokens in self.alone if each == letter and tokens >= 128)[:9]
        found = [(self.alone[letter, tokens] - self.overhead[letter]) / tokens for tokens in short]
        if min(found) <= 0:
            raise UserError(
                f"A layer of width {self.config.model.hidden_size} takes no longer for {short[0]} tokens than for one on this "
                "machine: raise --width, or run on a machine that does nothing else."
            )
        return min(found)


class _Chunks:
    """Times of a softmax layer on the first and the last of the 2d chunks of a document."""

    def __init__(self, model: ModelConfig, clock: KernelClock) -> None:
        self.block, self.width, self.clock = Block(model, model.layers.index("N")), model.hidden_size, clock
        self.block.reset_parameters()

    def seconds(self, tokens: int, degree: int) -> float:
        chunk = tokens // (2 * degree)
        return sum(self.clock(f"chunks of N / {degree}", tokens, self._run(chunk, before)) for before in (0, tokens - chunk))

    def _run(self, tokens: int, before: int) -> Callable[[], None]:
        mixer: Any = self.block.mixer
        x = torch.randn(tokens, self.width, requires_grad=True)
        past = [torch.randn(before, mixer.num_kv_heads, mixer.head_dim, requires_grad=True) for _ in range(2)]
        shard = WholeSequence(Documents((0, tokens), first_position=before))

        def run() -> None:
            self.block(x, shard, KVState(*past) if before else None).x.sum().backward()
            self.block.zero_grad(set_to_none=True)

        return run
