"""What is verified: every registered mixer, a small language model, or a mixer of one's own by import path.

Mixers are tiny, with awkward sizes, with no parameter at a value that hides an error (zero, one), and with gates that
*remember*: time constants of ten lengths and more. A gate that forgets within a rank hides what a rank hands over.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from longhaul.models.config import ModelConfig
from longhaul.models.errors import UserError
from longhaul.models.lm import LanguageModel
from longhaul.models.mixers.attention import AttentionConfig
from longhaul.models.mixers.based import BasedConfig
from longhaul.models.mixers.deltanet import DeltaNetConfig
from longhaul.models.mixers.gated_deltanet import GatedDeltaNetConfig
from longhaul.models.mixers.gla import GLAConfig
from longhaul.models.mixers.hgrn2 import HGRN2Config
from longhaul.models.mixers.kimi_delta import KimiDeltaConfig
from longhaul.models.mixers.lightning import LightningConfig
from longhaul.models.mixers.linear_attention import LinearAttentionConfig
from longhaul.models.mixers.mamba1 import Mamba1Config
from longhaul.models.mixers.mamba2 import Mamba2Config
from longhaul.models.mixers.rebased import ReBasedConfig
from longhaul.models.mixers.registry import MIXERS
from longhaul.models.mixers.retention import RetentionConfig
from longhaul.models.mixers.rwkv6 import RWKV6Config
from longhaul.models.mixers.rwkv7 import RWKV7Config
from longhaul.models.mixers.s4d import S4DConfig
from longhaul.models.mixers.s5 import S5Config
from longhaul.models.moe import MoEConfig
from longhaul.models.ops.attention import Mask
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import WholeSequence

WIDTH = 16
LAYER = 1

CONFIG: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": WIDTH,
    "num_layers": 2,
    "pattern": "LN",
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_size": 8,
    "linear_attention": LinearAttentionConfig(feature_map="elu+1", normalize=True, chunk=8),
    "lightning": LightningConfig(chunk=8),
    "retention": RetentionConfig(rotary=True, chunk=8),
    "mamba2": Mamba2Config(state_size=6, head_dim=8, num_groups=2, chunk=8),
    "mamba1": Mamba1Config(state_size=3, expand=1, chunk=8),
    "s4d": S4DConfig(state_size=6, chunk=8),
    "s5": S5Config(state_size=12, blocks=2, chunk=8),
    "gla": GLAConfig(expand_k=0.5, feature_map="silu", gate_low_rank=3, chunk=8),
    "hgrn2": HGRN2Config(expand_ratio=5, chunk=8),
    "rwkv6": RWKV6Config(mix_low_rank=3, decay_low_rank=4, chunk=8),
    "based": BasedConfig(feature_dim=2, chunk=8),
    "rebased": ReBasedConfig(feature_dim=2, chunk=8),
    "deltanet": DeltaNetConfig(negative_eigenvalues=True, output_gate=True, chunk=8),
    "gated_deltanet": GatedDeltaNetConfig(head_dim=5, expand_v=2, num_value_heads=4, chunk=8),
    "kimi_delta": KimiDeltaConfig(chunk=8),
    "rwkv7": RWKV7Config(decay_rank=3, rate_rank=4, gate_rank=5, chunk=8),
}

# Parameter -> range that makes a decay slow, for a mixer that has no `remember()` of its own.
REMEMBER: dict[str, dict[str, tuple[float, float]]] = {
    "gla": {"decay_up.bias": (3, 6)},
    "hgrn2": {"lower_bound": (4, 6)},
    "rwkv6": {"decay_up.bias": (-8, -5)},
    "rwkv7": {"decay_up.bias": (-9, -6)},
}
# Mixers whose tokens choose the shapes they are computed in, so that a document may change the last bits of another.
ROUTED = ("mom",)
USUAL = {"A_log": (-6.0, -4.0), "log_A_real": (-4.0, -2.0)}

WINDOW = "attention_window"
MODEL = "language_model"


class Subject(NamedTuple):
    """Something to verify.

    Attributes:
        name: in cells and in `--mixer`.
        recurrent, masks: what it needs from an engine: state along the sequence, softmax attention of these masks.
        make: a fresh module, parameters seeded, in float32.
        static: shapes do not depend on values, so one document may not change a bit of another.
        is_model: a whole language model, verified through an optimizer step.
    """

    name: str
    recurrent: bool
    masks: tuple[Mask, ...]
    make: Callable[[], nn.Module]
    static: bool = True
    is_model: bool = False


def names() -> list[str]:
    """Every registered mixer, attention with a window, and the language model."""
    return [*MIXERS, WINDOW, MODEL]


@functools.cache
def subject(name: str) -> Subject:
    """A registered mixer, or one's own at `package.module:Class`. What it needs is seen from a run in one process."""
    if name == MODEL:
        needs = _language_model().needs()  # type: ignore[operator]
        return Subject(name, needs[0], tuple(needs[1]), _language_model, is_model=True)
    make = functools.partial(_own, load(name)) if ":" in name else functools.partial(_registered, name)
    shard = _Watching(Documents((0, 3, 10)))
    with torch.no_grad():
        make()(torch.zeros(10, WIDTH), shard, None)
    return Subject(name, shard.recurrent, tuple(shard.masks), make, name not in ROUTED)


def _registered(name: str) -> nn.Module:
    mixer = "attention" if name == WINDOW else name
    options = {"attention": AttentionConfig(window=9)} if name == WINDOW else {}
    return prepared(MIXERS[mixer].build(ModelConfig(**{**CONFIG, **options}), LAYER), REMEMBER.get(mixer, {}))


def _own(found: type, hidden_size: int = WIDTH) -> nn.Module:
    built = found.build(ModelConfig(**CONFIG), LAYER) if hasattr(found, "build") else found(hidden_size)
    return prepared(built, {})


def prepared(module: nn.Module, slow: dict[str, tuple[float, float]]) -> nn.Module:
    """Initialised, moved off special values, with gates that remember. The same on every rank."""
    torch.manual_seed(0)
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()  # type: ignore[operator]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        if hasattr(module, "remember"):
            module.remember()  # type: ignore[operator]
            return module
        for name, parameter in module.named_parameters():
            for slow_name, (low, high) in {**USUAL, **slow}.items():
                if name == slow_name or name.endswith("." + slow_name):
                    parameter.uniform_(low, high)
    return module


def _language_model() -> nn.Module:
    """Mamba-2 and softmax attention, each with a mixture of experts whose balance loss counts."""
    moe = MoEConfig(num_experts=3, top_k=2, expert_hidden_size=6, balance_weight=0.1)
    return prepared(LanguageModel(ModelConfig(**CONFIG, ffn="moe", moe=moe)), {})


def load(path: str) -> type:
    """The class at `package.module:Class`."""
    module_name, _, class_name = path.partition(":")
    if not class_name:
        raise UserError(f"--module {path!r} names no class: give package.module:Class.")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except ModuleNotFoundError as error:
        where = "give a module on the path or below this folder"
        raise UserError(f"--module {path!r} cannot be imported ({error}): {where}.") from error
    except AttributeError:
        raise UserError(f"--module {path!r}: {module_name} has no {class_name!r}.") from None
    if not (inspect.isclass(found) and issubclass(found, nn.Module)):
        raise UserError(f"--module {path!r} is no class of torch.nn.Module.")
    return found


class _Watching(WholeSequence):
    """Notes what a module asks of its door."""

    def __init__(self, documents: Documents) -> None:
        super().__init__(documents)
        self.recurrent, self.masks = False, list[Mask]()

    def scan(self, *args: Any, **kwargs: Any) -> Any:
        self.recurrent = True
        return super().scan(*args, **kwargs)

    def halo(self, *args: Any, **kwargs: Any) -> Any:
        self.recurrent = True
        return super().halo(*args, **kwargs)

    def prefix(self, *args: Any, **kwargs: Any) -> Any:
        self.recurrent = True
        return super().prefix(*args, **kwargs)

    def attend(self, q: Any, k: Any, v: Any, mask: Mask = Mask(), *args: Any, **kwargs: Any) -> Any:
        self.masks.append(mask)
        return super().attend(q, k, v, mask, *args, **kwargs)
