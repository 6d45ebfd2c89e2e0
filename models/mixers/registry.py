"""Mixers by name. A new one is a file, a line here, and a field of `ModelConfig` with its options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from ..sequence import SequenceShard
from .attention import SoftmaxAttention
from .based import Based
from .deltanet import DeltaNet
from .gated_deltanet import GatedDeltaNet
from .gla import GLA
from .hgrn2 import HGRN2
from .jrt import JRT
from .kimi_delta import KimiDelta
from .lightning import Lightning
from .linear_attention import LinearAttention
from .longvq import LongVQ
from .mamba1 import Mamba1
from .mamba2 import Mamba2
from .memmamba import MemMamba
from .mom import MoM
from .paragru import ParaGRU
from .paralstm import ParaLSTM
from .rebased import ReBased
from .retention import Retention
from .rwkv6 import RWKV6
from .rwkv7 import RWKV7
from .s4d import S4D
from .s5 import S5

if TYPE_CHECKING:
    from ..config import ModelConfig


class Mixer(Protocol):
    """What a mixer class offers; it is an `nn.Module`."""

    @classmethod
    def build(cls, model: ModelConfig, layer: int) -> nn.Module:
        """The mixer of block `layer` (from 0), from the model's configuration."""
        ...

    def reset_parameters(self) -> None:
        """Initialise as published."""
        ...

    def forward(self, x: Tensor, shard: SequenceShard, state: Any = None) -> tuple[Tensor, Any]:
        """[T, D] -> [T, D], and a NamedTuple of tensors (None entries unless `shard.keep_state`)."""
        ...

    def flops_per_token(self, seq_length: int) -> int:
        """Forward FLOPs of one token of a document of `seq_length` tokens."""
        ...


MIXERS: dict[str, type[Mixer]] = {
    "attention": SoftmaxAttention,
    "linear_attention": LinearAttention,
    "lightning": Lightning,
    "retention": Retention,
    "mamba2": Mamba2,
    "mamba1": Mamba1,
    "memmamba": MemMamba,
    "s4d": S4D,
    "s5": S5,
    "gla": GLA,
    "hgrn2": HGRN2,
    "rwkv6": RWKV6,
    "based": Based,
    "rebased": ReBased,
    "deltanet": DeltaNet,
    "gated_deltanet": GatedDeltaNet,
    "kimi_delta": KimiDelta,
    "rwkv7": RWKV7,
    "mom": MoM,
    "paragru": ParaGRU,
    "paralstm": ParaLSTM,
    "jrt": JRT,
    "longvq": LongVQ,
}
