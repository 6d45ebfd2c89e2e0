"""Products with weights in 8-bit floats, through torchao: training on GPUs that multiply in fp8.

Weights and their gradients stay in float32; operands of a product are scaled, one factor a tensor, and rounded to e4m3
(gradients to e5m2). Everything else is as under bf16.
"""

from __future__ import annotations

import torch
from torch import nn

from .errors import UserError

MULTIPLE, NARROW = 16, 256  # what the GPUs' products ask for; below this width a product stays in bf16
CAPABILITY = (8, 9)


def check_fp8(device: torch.device) -> None:
    """Refuse what cannot multiply in fp8.

    Raises:
        UserError: the device is no GPU, one without fp8, or torchao is not installed.
    """
    told = "set train.precision to bf16"
    if device.type != "cuda":
        raise UserError(f"train.precision fp8 needs a GPU that multiplies in fp8, not the {device.type.upper()}: {told}.")
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        raise UserError(
            f"train.precision fp8 needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or later, but "
            f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}: {told}."
        )
    try:
        import torchao.float8  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"train.precision fp8 needs torchao, which cannot be imported ({error}): pip install torchao, or {told}."
        ) from None


def fits_fp8(module: nn.Module, name: str) -> bool:
    """Whether a layer's products are worth it and possible."""
    if not isinstance(module, nn.Linear):
        return False
    sizes = module.in_features, module.out_features
    return min(sizes) >= NARROW and not any(size % MULTIPLE for size in sizes)


def convert_to_fp8(model: nn.Module) -> None:
    """Replace linear layers in place; names and parameters stay. Before anything shards them."""
    from torchao.float8 import convert_to_float8_training

    convert_to_float8_training(model, module_filter_fn=fits_fp8)
