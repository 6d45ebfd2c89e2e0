"""torch.compile of code that looks at one token at a time: feed-forward layers and norms.

Door calls stay outside: what crosses ranks is opaque to a compiler, and documents change with every micro-batch. Modules are
compiled in place, so that names of parameters stay, and for any number of tokens.
"""

from __future__ import annotations

import importlib.util
import shutil

import torch
from torch import nn

from .errors import UserError
from .ffn import SwiGLU
from .norm import RMSNorm

TOKEN_LOCAL = (SwiGLU, RMSNorm)


def check_compiler(device: torch.device) -> None:
    """Refuse a machine on which nothing can be compiled.

    Raises:
        UserError: no C++ compiler for the CPU, or no triton for a GPU.
    """
    if device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        raise UserError(
            "train.compile needs a C++ compiler on a CPU, and neither g++ nor clang++ is in the PATH: install one, or set "
            "train.compile to false."
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("train.compile needs triton on a GPU: pip install triton, or set train.compile to false.")


def compile_token_local(model: nn.Module, backend: str = "inductor") -> int:
    """Compile, at their first forward, all modules of `model` that are token-local; returns how many there are.

    Args:
        backend: of torch.compile.
    """
    found = [module for module in model.modules() if isinstance(module, TOKEN_LOCAL)]
    for module in found:
        module.compile(dynamic=True, backend=backend)
    return len(found)
