"""The language model of a cell through one optimizer step: the loss, the norm and every gradient, with masks.

All tokens of one rank have no weight, and a label follows its token over ranks. The reference is plain torch: sum over sum
in one process. The step itself is the trainer's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longhaul.launcher.data import Stream
from longhaul.launcher.step import Stepper
from longhaul.models.lm import LanguageModel, LossOutput
from longhaul.models.sequence import WholeSequence
from longhaul.parallel.comm import Comm
from longhaul.parallel.data import DataParallel
from longhaul.parallel.engine import SequenceParallel
from longhaul.parallel.mesh import ParallelMesh
from longhaul.parallel.runtime import Runtime

from .cells import DTYPES, Cell, stream_of
from .exactness import error
from .subjects import VOCABULARY, subject


class _Keeping(torch.optim.SGD):
    """Plain SGD that keeps the gradients it was given."""

    def step(self, closure: Any = None) -> Any:
        self.kept = [[p.grad.detach().clone() for p in group["params"]] for group in self.param_groups]
        return super().step(closure)


def make_stream(cell: Cell, masked: list[tuple[int, int]]) -> Stream:
    """Tokens, labels shifted inside each document, and weights that are zero at `masked`."""
    documents = stream_of(cell)
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, VOCABULARY, (documents.num_tokens,), generator=generator)
    labels, weights = tokens.roll(-1), (torch.rand(documents.num_tokens, generator=generator) < 0.8).float()
    for bound in documents.bounds[1:]:
        labels[bound - 1], weights[bound - 1] = 0, 0
    for start, stop in masked:
        weights[start:stop] = 0
    return Stream(tokens, labels, weights, documents.bounds, documents.first_position)


def errors(
    cell: Cell, engine: SequenceParallel, runtime: Runtime, mesh: ParallelMesh, comm: Comm
) -> dict[str, float]:
    """Errors by name, on this rank."""
    dtype, device = DTYPES[cell.dtype], runtime.device
    nobody = sum(map(ord, cell.key)) % comm.size
    stream = make_stream(cell, list(engine.layout(stream_of(cell)).parts[nobody]))
    model = subject(cell.mixer).make()
    assert isinstance(model, LanguageModel)
    model = model.to(device=device, dtype=dtype)
    whole = WholeSequence(stream_of(cell), device)
    arguments = (tensor.to(device) for tensor in (stream.tokens, stream.labels, stream.weights))
    tokens, labels, weights = arguments
    output = model(tokens, whole, None, labels=labels, weights=weights)
    assert isinstance(output, LossOutput)
    assert output.aux_sum is not None, "its experts have a balance loss"
    count = weights.sum().clamp_min(1)
    expected = output.loss_sum / count
    reported = (output.loss_sum.detach() - output.aux_sum) / count  # a step says the language model's loss alone
    named = dict(model.named_parameters())
    reference: dict[str, Tensor] = dict(zip(named, torch.autograd.grad(expected, list(named.values()))))
    norm = torch.stack([gradient.double().square().sum() for gradient in reference.values()]).sum().sqrt()

    parallel = DataParallel(model, mesh, "ddp")
    optimizer = _Keeping(model.parameters(), lr=1.0)
    result = Stepper(parallel, engine, runtime, optimizer).train([stream], 0.5)
    found = {
        "loss": error(torch.tensor(result.loss, dtype=torch.float64), reported.cpu()),
        "gradient norm": error(torch.tensor(result.gradient_norm, dtype=torch.float64), norm.cpu()),
    }
    for (name, gradient), kept in zip(reference.items(), optimizer.kept[0]):
        found[f"gradient of {name}"] = error(kept, gradient)
    return found
