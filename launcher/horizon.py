"""The effective horizon as a metric: a forward over one stream, made for it alone and counted in no step."""

from __future__ import annotations

from statistics import median

import torch

from longhaul.parallel.data import DataParallel
from longhaul.parallel.engine import SequenceParallel
from longhaul.parallel.horizon import DecayWatch

from .batches import place
from .data import Stream


@torch.no_grad()
def effective_horizon(
    model: DataParallel,
    engine: SequenceParallel,
    stream: Stream,
    device: torch.device,
    bf16: bool = False,
    most: int | None = None,
) -> tuple[float, float] | None:
    """The shortest and the median horizon of the recurrent layers; None if none has decays. All ranks take part.

    Args:
        stream: whose tokens decide the gates; the same on every rank.
        bf16: products in bfloat16, as in training.
        most: tokens of the stream to look at; None: all.
    """
    if most is not None and most < stream.tokens.shape[0]:
        bounds = (*(bound for bound in stream.bounds if bound < most), most)
        tokens, labels, weights = (tensor[:most] for tensor in (stream.tokens, stream.labels, stream.weights))
        stream = Stream(tokens, labels, weights, bounds, stream.first_position)
    batch, watch = place(stream, engine, device), DecayWatch()
    training = model.model.training
    model.model.eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        model(batch.tokens, watch.watch(batch.shard), None, labels=batch.labels, weights=batch.weights)
    model.model.train(training)
    found = watch.horizons(engine.comm, engine.tensor)
    return (min(found), median(found)) if found else None
