"""What a model is: typed, frozen, checked before anything is built."""

from __future__ import annotations

from dataclasses import dataclass, field

from .errors import UserError
from .mixers.attention import AttentionConfig
from .mixers.based import BasedConfig
from .mixers.deltanet import DeltaNetConfig
from .mixers.gated_deltanet import GatedDeltaNetConfig
from .mixers.gla import GLAConfig
from .mixers.hgrn2 import HGRN2Config
from .mixers.jrt import JRTConfig
from .mixers.kimi_delta import KimiDeltaConfig
from .mixers.lightning import LightningConfig
from .mixers.linear_attention import LinearAttentionConfig
from .mixers.longvq import LongVQConfig
from .mixers.mamba1 import Mamba1Config
from .mixers.mamba2 import Mamba2Config
from .mixers.memmamba import MemMambaConfig
from .mixers.mom import MoMConfig
from .mixers.paragru import ParaGRUConfig
from .mixers.paralstm import ParaLSTMConfig
from .mixers.rebased import ReBasedConfig
from .mixers.retention import RetentionConfig
from .mixers.rwkv6 import RWKV6Config
from .mixers.rwkv7 import RWKV7Config
from .mixers.s4d import S4DConfig
from .mixers.s5 import S5Config
from .moe import MoEConfig

LINEAR_MIXERS = (
    "linear_attention",
    "lightning",
    "retention",
    "mamba2",
    "mamba1",
    "memmamba",
    "s4d",
    "s5",
    "gla",
    "hgrn2",
    "rwkv6",
    "based",
    "rebased",
    "deltanet",
    "gated_deltanet",
    "kimi_delta",
    "rwkv7",
    "mom",
    "paragru",
    "paralstm",
    "longvq",
)
PREFIX_MIXERS = ("jrt",)  # not causal inside a document's prefix, so a stream cannot be cut there
LETTERS = "LNM*-"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder of pre-norm blocks whose kinds a pattern string names."""

    vocab_size: int = 264
    """Rows of the embedding; at least the tokenizer's vocabulary, best a multiple of 8."""

    hidden_size: int = 128
    """Width D of the residual stream."""

    num_layers: int = 4
    """Blocks; the pattern is repeated to this length."""

    pattern: str = "LLLN"
    """One letter a block: L linear mixer and FFN, N softmax attention and FFN; in Megatron's letters M Mamba-2, * softmax
    attention, - FFN, each alone."""

    linear_mixer: str = "mamba2"
    """What L stands for: the name of a mixer, such as mamba2, gated_deltanet, gla or lightning."""

    num_heads: int = 4
    """Heads of linear and softmax attention (Mamba-2 derives its own from its head width)."""

    num_kv_heads: int | None = None
    """Key/value heads of softmax attention; as many as heads if left out."""

    ffn_hidden_size: int | None = None
    """Inner width of the SwiGLU; 8/3 of the hidden size, rounded up to a multiple of 64, if left out."""

    ffn: str = "swiglu"
    """The feed-forward layer: swiglu, or moe (a mixture of experts; options in moe)."""

    norm_eps: float = 1e-5
    """Added to the mean square in every RMSNorm."""

    tie_embeddings: bool = True
    """Use the embedding as the output projection."""

    initializer_range: float = 0.02
    """Standard deviation of the embedding's, FFN's and softmax attention's initial weights."""

    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Softmax attention."""

    linear_attention: LinearAttentionConfig = field(default_factory=LinearAttentionConfig)
    """Basic linear attention."""

    lightning: LightningConfig = field(default_factory=LightningConfig)
    """Lightning attention."""

    retention: RetentionConfig = field(default_factory=RetentionConfig)
    """Retention."""

    mamba2: Mamba2Config = field(default_factory=Mamba2Config)
    """Mamba-2."""

    mamba1: Mamba1Config = field(default_factory=Mamba1Config)
    """Mamba-1."""

    memmamba: MemMambaConfig = field(default_factory=MemMambaConfig)
    """MemMamba."""

    s4d: S4DConfig = field(default_factory=S4DConfig)
    """S4D."""

    s5: S5Config = field(default_factory=S5Config)
    """S5."""

    gla: GLAConfig = field(default_factory=GLAConfig)
    """Gated linear attention."""

    hgrn2: HGRN2Config = field(default_factory=HGRN2Config)
    """HGRN2."""

    rwkv6: RWKV6Config = field(default_factory=RWKV6Config)
    """RWKV-6."""

    based: BasedConfig = field(default_factory=BasedConfig)
    """Based."""

    rebased: ReBasedConfig = field(default_factory=ReBasedConfig)
    """ReBased."""

    deltanet: DeltaNetConfig = field(default_factory=DeltaNetConfig)
    """DeltaNet."""

    gated_deltanet: GatedDeltaNetConfig = field(default_factory=GatedDeltaNetConfig)
    """Gated DeltaNet."""

    kimi_delta: KimiDeltaConfig = field(default_factory=KimiDeltaConfig)
    """Kimi Delta Attention."""

    rwkv7: RWKV7Config = field(default_factory=RWKV7Config)
    """RWKV-7."""

    mom: MoMConfig = field(default_factory=MoMConfig)
    """Mixture of memories."""

    paragru: ParaGRUConfig = field(default_factory=ParaGRUConfig)
    """ParaGRU."""

    paralstm: ParaLSTMConfig = field(default_factory=ParaLSTMConfig)
    """ParaLSTM."""

    jrt: JRTConfig = field(default_factory=JRTConfig)
    """Prefix linear attention."""

    longvq: LongVQConfig = field(default_factory=LongVQConfig)
    """Attention to vector-quantised keys."""

    moe: MoEConfig = field(default_factory=MoEConfig)
    """Mixture of experts."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} must be at least 1, but is {getattr(self, name)}.")
        unknown = sorted(set(self.pattern) - set(LETTERS))
        if unknown or not self.pattern:
            raise UserError(f"model.pattern {self.pattern!r} may only use the letters {' '.join(LETTERS)}.")
        known = (*LINEAR_MIXERS, *PREFIX_MIXERS)
        if self.linear_mixer not in known:
            raise UserError(f"model.linear_mixer {self.linear_mixer!r} is none of {', '.join(known)}.")
        if self.ffn not in ("swiglu", "moe"):
            raise UserError(f"model.ffn {self.ffn!r} is neither swiglu nor moe.")
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"model.hidden_size {self.hidden_size} must be a multiple of model.num_heads {self.num_heads}."
            )
        if self.num_kv_heads is not None and (self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads):
            raise UserError(f"model.num_kv_heads {self.num_kv_heads} must divide model.num_heads {self.num_heads}.")

    @property
    def layers(self) -> str:
        """The pattern, one letter per block."""
        return (self.pattern * self.num_layers)[: self.num_layers]

    @property
    def prefix_length(self) -> int:
        """Leading tokens of a document that all of it reads, later ones too; 0 in a causal model."""
        if self.linear_mixer not in PREFIX_MIXERS or "L" not in self.layers:
            return 0
        return int(getattr(self, self.linear_mixer).prefix_length)

    @property
    def ffn_width(self) -> int:
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        return -(-8 * self.hidden_size // (3 * 64)) * 64
