"""What a checkpoint holds, as named tensors and facts, and how a run takes it back.

    model.<name>                parameters and buffers
    optimizer.<name>.<key>      the optimizer's state of each parameter
    carried.<i>                 states carried between streams, if they are
    rng.<rank>                  generators of each process

Names and shapes are those of the whole model. What a process holds of a tensor are pieces of it (`parallel/pieces.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from longhaul.models.errors import UserError
from longhaul.models.heads import Kept
from longhaul.parallel.checkpoint import Checkpoint, load, tensor_shapes
from longhaul.parallel.pieces import as_pieces, whole_shape

from .config import TrainConfig
from .data import Data

Cuts = Callable[[str], Sequence[Kept]]
"""How the model's parameter or buffer of a name is cut."""


def _whole(name: str) -> Sequence[Kept]:
    return ()


def model_tensors(model: nn.Module, cuts: Cuts = _whole) -> dict[str, Tensor]:
    """Parameters and buffers that belong into a checkpoint; a shared one under each of its names."""
    return {f"model.{name}": as_pieces(tensor, cuts(name)) for name, tensor in model.state_dict().items()}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, cuts: Cuts = _whole) -> dict[str, Tensor]:
    """The optimizer's state under the names of the parameters. What has a parameter's shape is cut like it."""
    return {
        f"optimizer.{name}.{key}": as_pieces(value, cuts(name)) if value.shape == parameter.shape else value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def collect(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    carried: Any,
    rank: int,
    device: torch.device,
    cuts: Cuts = _whole,
) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    state = {**model_tensors(model, cuts), **optimizer_tensors(model, optimizer, cuts), f"rng.{rank}": torch.get_rng_state()}
    if device.type == "cuda":
        state[f"rng_cuda.{rank}"] = torch.cuda.get_rng_state(device)
    tensors = [leaf for leaf in tree_flatten(carried)[0] if isinstance(leaf, Tensor)]
    state.update({f"carried.{index}": tensor for index, tensor in enumerate(tensors)})
    return state


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rank: int,
    device: torch.device,
    carried_like: Callable[[], Any],
    cuts: Cuts = _whole,
) -> Any:
    """Fill model, optimizer and generators from a checkpoint of any topology; returns the carried states.

    Args:
        carried_like: makes carried states of any size, for their structure; called only if there are some.
    """
    shapes = tensor_shapes(checkpoint)
    state = model_tensors(model, cuts)
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        whole = whole_shape(parameter.shape, cuts(name))
        for key, (shape, dtype) in ((k, v) for k, v in shapes.items() if k.startswith(prefix)):
            like = torch.zeros_like(parameter) if shape == whole and shape else torch.zeros(shape, dtype=dtype)
            optimizer.state[parameter][key[len(prefix) :]] = like
    state.update(optimizer_tensors(model, optimizer, cuts))
    generators = [f"rng.{rank}"] + ([f"rng_cuda.{rank}"] if device.type == "cuda" else [])
    carried = [f"carried.{index}" for index in range(sum(name.startswith("carried.") for name in shapes))]
    for name in (*generators, *carried):
        if name in shapes:  # a topology with more processes has generators that none saved
            size, dtype = shapes[name]
            state[name] = torch.empty(size, dtype=dtype, device=device if name in carried else "cpu")
    load(checkpoint, state)
    if f"rng.{rank}" in state:
        torch.set_rng_state(state[f"rng.{rank}"])
    if f"rng_cuda.{rank}" in state:
        torch.cuda.set_rng_state(state[f"rng_cuda.{rank}"], device)
    if not carried:
        return None
    leaves, structure = tree_flatten(carried_like())
    names = iter(carried)
    return tree_unflatten([state[next(names)] if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)


def fingerprint(config: TrainConfig, data: Data) -> dict[str, Any]:
    """What must be equal for a run to go on: the model's shape, the optimizer's kind, and every sample."""
    model = _flatten("model", dataclasses.asdict(config.model))
    return {
        **model,
        "optimizer.name": config.optimizer.name,
        "data.carry_state": config.data.carry_state,
        "data.tokenizer": data.tokenizer.fingerprint,
        "data.seq_length": config.data.seq_length,
        "data.seed": config.data.seed,
        "data.validation_fraction": config.data.validation_fraction,
        "data.paths (content)": data.train.fingerprint,
    }


def check_fingerprint(checkpoint: Checkpoint, expected: dict[str, Any]) -> None:
    """UserError, naming the first difference, if the checkpoint is of another model or of other data."""
    found = checkpoint.facts.get("fingerprint", {})
    for key in sorted({*found, *expected}, key=lambda name: (not name.startswith("model."), name)):
        before, now = found.get(key), expected.get(key)
        if isinstance(now, tuple):
            now = list(now)  # as JSON gave it back
        if before != now:
            what = "model" if key.startswith("model.") else "optimizer" if key.startswith("optimizer.") else "data"
            raise UserError(
                f"Checkpoint {checkpoint.path} is of another {what}: {key} is {before} there and {now} here; set it back, "
                "or give another checkpoint.folder to start a new run."
            )


def _flatten(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}.{name}"
        flat.update(_flatten(key, value) if isinstance(value, dict) else {key: value})
    return flat
