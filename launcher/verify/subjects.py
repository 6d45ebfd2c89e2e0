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
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from longhaul.models import encoder
from longhaul.models.config import ModelConfig
from longhaul.models.errors import UserError
from longhaul.models.lm import LanguageModel
from longhaul.models.mixers.registry import MIXERS
from longhaul.models.ops.attention import Mask
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import SequenceShard, WholeSequence

WIDTH = 16
VOCABULARY = 24
LAYER = 1

# Options of mixers, beside chunks of 8 tokens: odd widths, and every optional part on.
OPTIONS: dict[str, dict[str, Any]] = {
    "linear_attention": {"feature_map": "elu+1", "normalize": True},
    "retention": {"rotary": True},
    "mamba2": {"state_size": 6, "head_dim": 8, "num_groups": 2},
    "mamba1": {"state_size": 3, "expand": 1},
    "memmamba": {"summary_width": 4, "slots": 3, "block": 4, "period": 2},
    "s4d": {"state_size": 6},
    "s5": {"state_size": 12, "blocks": 2},
    "gla": {"expand_k": 0.5, "feature_map": "silu", "gate_low_rank": 3},
    "hgrn2": {"expand_ratio": 5},
    "rwkv6": {"mix_low_rank": 3, "decay_low_rank": 4},
    "based": {"feature_dim": 3},
    "rebased": {"feature_dim": 3},
    "jrt": {"prefix_length": 4, "feature_dim": 3},
    "longvq": {"num_codes": 6},
    "deltanet": {"negative_eigenvalues": True, "output_gate": True},
    "gated_deltanet": {"head_dim": 5, "expand_v": 2, "num_value_heads": 4},
    "rwkv7": {"decay_rank": 3, "rate_rank": 4, "gate_rank": 5},
}


def config(**options: Any) -> ModelConfig:
    """A tiny model whose mixers have `OPTIONS`; `options` are fields of its own."""
    plain = ModelConfig()
    mixers = {}
    for field in fields(ModelConfig):
        own = getattr(plain, field.name)
        if is_dataclass(own) and field.name not in options:
            chunk = {"chunk": 8} if hasattr(own, "chunk") else {}
            mixers[field.name] = replace(own, **chunk, **OPTIONS.get(field.name, {}))  # type: ignore[type-var]
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    return ModelConfig(**{**sizes, **mixers, "pattern": "LN", "ffn_hidden_size": 8, **options})


# Parameter -> range that makes a decay slow and keeps numbers well conditioned, for a mixer without its own `remember()`.
REMEMBER: dict[str, dict[str, tuple[float, float]]] = {
    "gla": {"decay_up.bias": (3, 6)},
    "hgrn2": {"lower_bound": (4, 6)},
    "rwkv6": {"decay_up.bias": (-8, -5)},
    "rwkv7": {"decay_up.bias": (-9, -6)},
    "rebased": {"weight": (0.4, 0.8), "bias": (1.5, 2.0)},  # a quotient whose denominator stays off zero
}
# Mixers whose tokens choose the shapes they are computed in, so that a document may change the last bits of another.
ROUTED = ("mom",)
# Mixers that read a prefix, or the whole document, both ways; one's own says `causal = False`.
BOTH_WAYS = ("jrt",)
USUAL = {"A_log": (-6.0, -4.0), "log_A_real": (-4.0, -2.0)}

WINDOW = "attention_window"
# One head: an axis of length one must not be taken for one that broadcasts, and most ranks get no head of it.
ONE_HEAD = {"mamba2_one_head": "mamba2", "gla_one_head": "gla", "attention_one_head": "attention"}
MODEL = "language_model"
ENCODERS = {f"encoder_{name}": name for name in encoder.MIXERS}

# Mixers whose gates and skips are single numbers with one head: their gradients are sums that cancel, which float32 alone gets
# wrong by 7e-5 in one process.
WIDE_ONLY = ("mamba2_one_head",)


class Subject(NamedTuple):
    """Something to verify.

    Attributes:
        name: in cells and in `--mixer`.
        recurrent, masks: what it needs from an engine: state along the sequence, softmax attention of these masks.
        make: a fresh module, parameters seeded, in float32.
        causal: no output depends on later tokens.
        static: shapes do not depend on values, so one document may not change a bit of another.
        stateful: a stream may be continued.
        is_model: a whole language model, verified through an optimizer step.
    """

    name: str
    recurrent: bool
    masks: tuple[Mask, ...]
    make: Callable[[], nn.Module]
    causal: bool = True
    static: bool = True
    stateful: bool = True
    is_model: bool = False


def names() -> list[str]:
    """Every registered mixer, attention with a window, mixers of one head, the encoder's mixers, and the language model."""
    return [*MIXERS, WINDOW, *ONE_HEAD, *ENCODERS, MODEL]


@functools.cache
def subject(name: str) -> Subject:
    """A registered mixer, or one's own at `package.module:Class`. What it needs is seen from a run in one process."""
    if name == MODEL:
        needs = _language_model().needs()  # type: ignore[operator]
        return Subject(name, needs[0], tuple(needs[1]), _language_model, is_model=True)
    make = functools.partial(_own, load(name)) if name not in names() else functools.partial(_registered, name)
    shard = _Watching(Documents((0, 3, 10)))
    module = make()
    with torch.no_grad():
        module(torch.zeros(10, WIDTH), shard, None)
    causal = bool(getattr(module, "causal", name not in (*BOTH_WAYS, *ENCODERS)))
    masks = tuple(dict.fromkeys(shard.masks))
    return Subject(name, shard.recurrent, masks, make, causal, name not in ROUTED, name not in ENCODERS)


class _Stateless(nn.Module):
    """A mixer of the encoder, called like the others."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def reset_parameters(self) -> None:
        self.mixer.reset_parameters()  # type: ignore[operator]

    def forward(self, x: torch.Tensor, shard: SequenceShard, state: Any = None) -> tuple[torch.Tensor, Any]:
        return self.mixer(x, shard), ()


def _registered(name: str) -> nn.Module:
    if name in ENCODERS:
        sizes = encoder.EncoderConfig(hidden_size=WIDTH, num_heads=4, max_positions=64, projected=5)
        return prepared(_Stateless(encoder.MIXERS[ENCODERS[name]](sizes)), {})
    mixer = "attention" if name == WINDOW else ONE_HEAD.get(name, name)
    options: dict[str, Any] = {}
    if name == WINDOW:
        options = {"attention": replace(ModelConfig().attention, window=9)}
    if name in ONE_HEAD:
        heads = {"head_dim": 2 * WIDTH, "num_groups": 1} if mixer == "mamba2" else {}
        own = replace(getattr(config(), mixer), **heads)
        options = {"num_heads": 1, "num_kv_heads": 1, mixer: own}
    return prepared(MIXERS[mixer].build(config(**options), LAYER), REMEMBER.get(mixer, {}))


def _own(found: type, hidden_size: int = WIDTH) -> nn.Module:
    built = found.build(config(), LAYER) if hasattr(found, "build") else found(hidden_size)
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
            found = slow.get(name) or USUAL.get(name.rpartition(".")[2])
            if found is not None:
                parameter.uniform_(*found)
    return module


def _language_model() -> nn.Module:
    """Mamba-2 and softmax attention, each with a mixture of experts whose balance loss counts."""
    moe = replace(ModelConfig().moe, num_experts=3, top_k=2, expert_hidden_size=6, balance_weight=0.1)
    return prepared(LanguageModel(config(ffn="moe", moe=moe)), {})


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
