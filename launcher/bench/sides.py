"""The two sides of `bench step`: our model and Hugging Face's, of the same architecture, on the same weights.

A side is a model and its training step without the optimizer: forward, loss (mean over all tokens but the last) and
backward.
Weights and gradients are compared under our names; `rename` turns those of Hugging Face into ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from longhaul.models.config import ModelConfig
from longhaul.models.errors import UserError
from longhaul.models.lm import LanguageModel
from longhaul.models.mixers.mamba2 import Mamba2Config
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import WholeSequence

MODELS = ("mamba2", "softmax")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Which model and how large; the defaults are the sizes of the published comparison."""

    model: str = "mamba2"
    length: int = 8192
    layers: int = 4
    hidden_size: int = 512
    state_size: int = 128
    head_dim: int = 64
    vocab_size: int = 4096

    def config(self) -> ModelConfig:
        """Our model of this shape."""
        return ModelConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_layers=self.layers,
            num_heads=self.hidden_size // self.head_dim,
            pattern={"mamba2": "M", "softmax": "N"}[self.model],
            tie_embeddings=False,
            mamba2=Mamba2Config(state_size=self.state_size, head_dim=self.head_dim),
        )

    def tokens(self) -> Tensor:
        """One document of random tokens, int64 [T], the same on both sides."""
        return torch.randint(self.vocab_size, (self.length,), generator=torch.Generator().manual_seed(1))


class Side(Protocol):
    """A model with its training step, in two halves so that each can be timed."""

    model: nn.Module

    def forward(self, tokens: Tensor) -> Tensor:
        """The loss of tokens [T]."""
        ...

    def named(self, select: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
        """A tensor of each parameter (itself, or its gradient) under our names."""
        ...


class Ours:
    """Longhaul's model: Mamba-2 blocks without FFN, or softmax attention with a SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        self.model: nn.Module = LanguageModel(shape.config())

    def forward(self, tokens: Tensor) -> Tensor:
        labels, weights = tokens.roll(-1), torch.ones(len(tokens))
        weights[-1] = 0  # nothing follows the last token
        output = self.model(tokens, WholeSequence(Documents((0, len(tokens)))), labels=labels, weights=weights)
        return output.loss_sum / output.weight_sum

    def named(self, select: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
        return _selected(self.model, select)


class HuggingFace:
    """`Mamba2ForCausalLM` or `LlamaForCausalLM` (scaled_dot_product_attention), as the library sets them up."""

    def __init__(self, shape: Shape) -> None:
        try:
            import transformers
        except ImportError:
            raise UserError("--peer hf needs the package transformers: pip install 'longhaul[hf]'.") from None
        transformers.utils.logging.set_verbosity_error()
        common: dict[str, Any] = {
            "vocab_size": shape.vocab_size, "hidden_size": shape.hidden_size, "num_hidden_layers": shape.layers,
            "tie_word_embeddings": False, "use_cache": False,
        }  # fmt: skip
        heads = shape.hidden_size // shape.head_dim
        self.shape = shape
        self.model: nn.Module
        if shape.model == "mamba2":
            config = transformers.Mamba2Config(
                **common, num_heads=2 * heads, head_dim=shape.head_dim, state_size=shape.state_size, n_groups=1
            )
            self.model = transformers.Mamba2ForCausalLM(config).train()
        else:
            common |= {
                "intermediate_size": shape.config().ffn_width,
                "rms_norm_eps": 1e-5,
                "attn_implementation": "sdpa",
            }
            llama = transformers.LlamaConfig(**common, num_attention_heads=heads, max_position_embeddings=shape.length)
            self.model = transformers.LlamaForCausalLM(llama).train()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.dim() == 1:  # constants at first, which would hide a swapped or missing vector
                    parameter.add_(0.05 * torch.randn_like(parameter))

    def forward(self, tokens: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=tokens[None], labels=tokens[None]).loss
        return loss

    def named(self, select: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
        return rename(self.shape.model, _selected(self.model, select))


SIDES: dict[str, Callable[[Shape], Side]] = {"ours": Ours, "hf": HuggingFace}


def _selected(model: nn.Module, select: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
    found = {name: select(parameter) for name, parameter in model.named_parameters()}
    missing = [name for name, tensor in found.items() if tensor is None]
    if missing:
        raise RuntimeError(f"no gradient of {', '.join(missing)}")
    return {name: tensor.detach() for name, tensor in found.items() if tensor is not None}


# Inside a layer: our name -> theirs; several are joined along the rows.
_LAYER: dict[str, dict[str, tuple[str, ...]]] = {
    "mamba2": {
        "mixer_norm.weight": ("norm.weight",),
        **{f"mixer.{name}": (f"mixer.{name}",) for name in ("in_proj.weight", "A_log", "dt_bias", "D", "out_proj.weight")},
        "mixer.conv_weight": ("mixer.conv1d.weight",),
        "mixer.conv_bias": ("mixer.conv1d.bias",),
        "mixer.norm_weight": ("mixer.norm.weight",),
    },
    "softmax": {
        "mixer_norm.weight": ("input_layernorm.weight",),
        "mixer.qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "mixer.out.weight": ("self_attn.o_proj.weight",),
        "ffn_norm.weight": ("post_attention_layernorm.weight",),
        "ffn.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "ffn.down.weight": ("mlp.down_proj.weight",),
    },
}
_OUTSIDE = {
    "mamba2": ("backbone.embeddings.weight", "backbone.norm_f.weight", "backbone.layers"),
    "softmax": ("model.embed_tokens.weight", "model.norm.weight", "model.layers"),
}


def rename(model: str, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's tensors (weights or gradients, by parameter name) under our names and in our shapes."""
    left = dict(theirs)
    embedding, norm, layers = _OUTSIDE[model]
    ours = {"embedding.weight": left.pop(embedding), "norm.weight": left.pop(norm)}
    ours["head.weight"] = left.pop("lm_head.weight")
    for layer in range(1 + max(int(name.removeprefix(f"{layers}.").split(".")[0]) for name in left)):
        for name, sources in _LAYER[model].items():
            parts = [left.pop(f"{layers}.{layer}.{source}") for source in sources]
            # The depthwise convolution's [channels, 1, taps] -> [channels, taps].
            ours[f"layers.{layer}.{name}"] = torch.cat([part.squeeze(1) if part.dim() == 3 else part for part in parts])
    assert not left, f"tensors without a counterpart: {sorted(left)}"
    return ours
