"""What `bench rsa` runs on ranks: one training step of an encoder, and the most bytes a rank holds in it.

Every allocation of the step is recorded, so a peak is a count of bytes that repeats, on a loaded machine too. Parameters,
gradients and AdamW's moments are there before the step and are added. What gloo holds inside a collective is not seen.

Letters: B documents of L tokens each, P ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from longhaul.launcher.plan.allocations import recorded, settled
from longhaul.models.encoder import Encoder, EncoderConfig, MaskedTokens
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import SequenceShard
from longhaul.parallel.attention.registry import make_attention
from longhaul.parallel.comm import Comm
from longhaul.parallel.engine import SequenceParallel
from longhaul.parallel.exchange.registry import make_exchange
from longhaul.parallel.layout import SequenceLayout
from longhaul.parallel.runtime import Runtime
from longhaul.parallel.shard import RankShard
from longhaul.parallel.tensor import TensorParallel

from .rsa_megatron import WholeBetweenLayers, keep_whole
from .rsa_search import largest
from .rsa_wire import Apart

MASKED = 7  # one token in so many is to be guessed: BERT's 15 % as a pattern, so that no rank has more by chance


class Shape(NamedTuple):
    """Of an encoder."""

    layers: int
    width: int
    heads: int
    inner: int  # of the SwiGLU: 8/3 of the width are as many parameters as BERT's 4 of two matrices
    vocabulary: int
    projected: int  # tokens to which Linformer projects a document

    def config(self, mixer: str, longest: int) -> EncoderConfig:
        return EncoderConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            num_layers=self.layers,
            num_heads=self.heads,
            mixer=mixer,
            max_positions=longest,
            projected=self.projected,
            ffn_hidden_size=self.inner,
        )


class Side(NamedTuple):
    """One way to divide the step among P ranks: tensor parallel, or the sequence."""

    title: str
    tensor: bool
    attention: str = "rsa"  # the engine; of one process that holds the sequence whole, it keeps all scores too
    mixer: str = "attention"
    whole: bool = False  # tensor parallel as in 2019: activations between layers whole on every rank


SIDES = {
    "megatron": Side("TP 2019", tensor=True, whole=True),
    "tensor": Side("TP", tensor=True),
    "rsa": Side("RSA", tensor=False),
    "linformer": Side("Linformer", tensor=False, mixer="linformer"),
    "ring": Side("ring", tensor=False, attention="ring"),
}


@dataclass
class Job:
    """A model on this rank, with gradients and moments, and how its tokens are spread.

    Attributes:
        fixed: bytes of parameters, gradients and moments held here.
    """

    side: Side
    comm: Comm
    model: Encoder
    documents: Documents

    def __post_init__(self) -> None:
        self.tensor = TensorParallel(self.model, self.comm if self.side.tensor else Comm(None))
        if self.side.tensor and self.side.whole:
            keep_whole(self.model, self.comm)
        self.parameters = list(self.model.parameters())
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        self.optimizer.step()  # makes the moments
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        self.fixed = sum(tensor.nbytes for tensor in (*self.parameters, *gradients, *moments))

    def shard(self) -> SequenceShard:
        """This rank's part of the stream."""
        if not self.side.tensor:
            engine = SequenceParallel(self.comm, attention=self.side.attention, layout="contiguous_per_document")
            if self.comm.size > 1:
                return engine.shard(self.documents)
        alone = Comm(None)
        kind = WholeBetweenLayers if self.side.whole else RankShard
        layout = SequenceLayout.contiguous(self.documents.num_tokens, 1)
        exchange, attention = make_exchange("all_gather", alone), make_attention(self.side.attention, alone)
        return kind(layout, self.documents, alone, exchange, attention, tensor=self.tensor.comm)

    def batch(self, shard: SequenceShard) -> MaskedTokens:
        """This rank's tokens of a stream that all ranks know."""
        assert isinstance(shard, RankShard)
        generator = torch.Generator().manual_seed(1)
        count = self.documents.num_tokens
        tokens = torch.randint(self.model.config.vocab_size, (count,), generator=generator)
        whole = MaskedTokens(tokens, tokens, (torch.arange(count) % MASKED == 0).float())
        return whole.rows(shard.layout.parts[shard.comm.rank])

    def backward(self, batch: MaskedTokens, shard: SequenceShard) -> float:
        """Add the gradients of the loss, the same on every rank that holds a parameter. Returns the sum of the loss here."""
        loss_sum, _ = self.model.loss(batch, shard)
        loss_sum.backward()
        if not self.side.tensor:
            for parameter in self.parameters:
                assert parameter.grad is not None
                parameter.grad.copy_(self.comm.all_reduce(parameter.grad, "gradients").wait())
        elif not self.side.whole:
            self.tensor.sum_shared_gradients()
        return loss_sum.item()


def make_job(comm: Comm, side: Side, shape: Shape, documents: int, length: int) -> Job:
    """`documents` documents of `length` tokens, and a model for them, alike on all ranks."""
    torch.manual_seed(0)
    model = Encoder(shape.config(side.mixer, length))
    return Job(side, comm, model, Documents(range(0, documents * length + 1, length)))


def step_peak(comm: Comm, side: Side, shape: Shape, documents: int, length: int) -> int:
    """The most bytes that any rank holds in a training step: forward, backward, sums of gradients, AdamW."""
    job = make_job(comm, side, shape, documents, length)
    shard = job.shard()
    batch = job.batch(shard)
    with recorded() as found:
        job.backward(batch, shard)
        job.optimizer.step()
    own = torch.tensor(job.fixed + found.peak)
    return int(comm.all_gather(own, "peak").wait().max())


class Axis(NamedTuple):
    """What is searched for while the other is held: length of `held` documents, or number of documents of `held` tokens."""

    name: str  # length or batch
    held: int

    def sizes(self, size: int) -> tuple[int, int]:
        """(documents, length) at a size."""
        return (self.held, size) if self.name == "length" else (size, self.held)


class Task(NamedTuple):
    """One search, from `start`; 0: from what the last side found."""

    side: str
    axis: Axis
    start: int


@settled()
def search(runtime: Runtime, shape: Shape, tasks: Sequence[Task], budget: int) -> dict[str, Any]:
    """On one rank: the largest size of each task, by its position, and the bytes of all that were tried. The first rank tells."""
    comm, answers = Apart(runtime.comm()), {}
    last: dict[Axis, int] = {}
    for index, (name, axis, start) in enumerate(tasks):

        def peak(size: int, name: str = name, axis: Axis = axis) -> int:
            found = step_peak(comm, SIDES[name], shape, *axis.sizes(size))
            if runtime.is_main:
                documents, length = axis.sizes(size)
                tried = f"{SIDES[name].title}, ranks: {comm.size}, documents: {documents}, tokens of each: {length}"
                print(f"{tried}, MiB: {found / 2**20:.2f}{'' if found <= budget else ', too much'}", flush=True)
            return found

        found = largest(peak, budget, start or last.get(axis, 8))
        last[axis] = max(1, found.size)
        answers[str(index)] = found._asdict()
    return answers
