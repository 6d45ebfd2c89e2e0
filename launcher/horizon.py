"""How far layers look back and how large states grow, as metrics: a forward over one stream, counted in no step."""

from __future__ import annotations

from statistics import median
from typing import NamedTuple

import torch

from longhaul.parallel.data import DataParallel
from longhaul.parallel.engine import SequenceParallel
from longhaul.parallel.horizon import StateWatch

from .batches import place
from .data import Stream


class Look(NamedTuple):
    """`horizons`: the shortest and the median effective horizon of the recurrent layers, in tokens; None if none has decays.
    `norm`: the largest norm of a head's state at the stream's end; None if no layer has one."""

    horizons: tuple[float, float] | None
    norm: float | None


@torch.no_grad()
def look_at_states(
    model: DataParallel,
    engine: SequenceParallel,
    stream: Stream,
    device: torch.device,
    bf16: bool = False,
    most: int | None = None,
) -> Look:
    """What the recurrent layers do on a stream. All ranks take part.

    Args:
        stream: whose tokens decide the gates; the same on every rank.
        bf16: products in bfloat16, as in training.
        most: tokens of the stream to look at; None: all.
    """
    if most is not None and most < stream.tokens.shape[0]:
        bounds = (*(bound for bound in stream.bounds if bound < most), most)
        tokens, labels, weights = (tensor[:most] for tensor in (stream.tokens, stream.labels, stream.weights))
        stream = Stream(tokens, labels, weights, bounds, stream.first_position)
    batch, watch = place(stream, engine, device, keep_state=True), StateWatch()
    training = model.model.training
    model.model.eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        model(batch.tokens, watch.watch(batch.shard), None, labels=batch.labels, weights=batch.weights)
    model.model.train(training)
    found = watch.horizons(engine.comm, engine.tensor)
    horizons = (min(found), median(found)) if found else None
    return Look(horizons, watch.largest_norm(engine.tensor))
