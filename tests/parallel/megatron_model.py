"""A small megatron-core GPTModel whose layers' mixers are ours, alike in every division, and what a rank holds of it."""

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longhaul.launcher.verify.subjects import config as model_config
from longhaul.parallel.megatron import MegatronMixer, mixer_spec

VOCABULARY, WIDTH, LENGTH, ROWS = 24, 16, 16, 2


class Norm(nn.LayerNorm):
    """Megatron's own one refuses `sequence_parallel`, which asks of a norm this mark only: gradients of parts are summed."""

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def transformer_config(mixers: Sequence[str], tensor: int, context: int, sequence_parallel: bool, **more: Any) -> Any:
    """A TransformerConfig for `gpt_model`, which fills the parameters itself."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=len(mixers),
        hidden_size=WIDTH,
        num_attention_heads=4,
        ffn_hidden_size=32,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        tensor_model_parallel_size=tensor,
        context_parallel_size=context,
        sequence_parallel=sequence_parallel,
        init_method=nn.init.zeros_,
        output_layer_init_method=nn.init.zeros_,
        **more,
    )


def gpt_model(config: Any, mixers: Sequence[str], layout: str, groups: int = 2, stage: int = 0, stages: int = 1) -> Any:
    """A GPTModel with a layer a mixer, or those of one stage; its parameters depend on nothing but their place in the whole."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    options = model_config()
    options = replace(options, mamba2=replace(options.mamba2, num_groups=groups))
    specs = []
    for mixer in mixers:
        spec = get_gpt_layer_local_spec()
        spec.submodules.self_attention = mixer_spec(options, mixer, layout=layout)
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = Norm
        specs.append(spec)
    each = len(specs) // stages
    layers = TransformerBlockSubmodules(layer_specs=specs[stage * each : (stage + 1) * each], layer_norm=Norm)
    ends = {"pre_process": stage == 0, "post_process": stage == stages - 1}
    model = GPTModel(config, layers, VOCABULARY, LENGTH, position_embedding_type="none", **ends)
    places = parts(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill(parameter, places[name])
    return model


class Part(NamedTuple):
    """A parameter's name in the whole model and its shape there, and the ranges of an axis that are held here (None: all)."""

    name: str
    shape: tuple[int, ...]
    axis: int | None
    ranges: tuple[tuple[int, int], ...]

    def of(self, whole: Tensor) -> Tensor:
        """What is held here of a tensor."""
        if self.axis is None:
            return whole
        return torch.cat([whole.narrow(self.axis, start, stop - start) for start, stop in self.ranges], dim=self.axis)


def parts(model: nn.Module) -> dict[str, Part]:
    """What this tensor rank holds of each parameter: of ours as the mixer noted it, of Megatron's by its marks."""
    from megatron.core import parallel_state

    size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    kept: dict[str, Any] = {}
    mixers = []
    layers = {}
    for prefix, module in model.named_modules():
        if isinstance(module, MegatronMixer):
            dotted = f"{prefix}." if prefix else ""
            mixers.append(f"{dotted}mixer.")
            kept.update({f"{dotted}mixer.{name}": held for name, held in module.kept.items()})
        if hasattr(module, "layer_number"):
            layers[f"{prefix}."] = module.layer_number  # of all stages
    found = {}
    for name, parameter in model.named_parameters():
        axis, ranges, shape = None, (), tuple(parameter.shape)
        if name.startswith(tuple(mixers)):
            assert parameter.tensor_model_parallel == (name in kept)
            if name in kept:
                axis, shape = kept[name].axis, kept[name].shape
                ranges = tuple((held.start, held.stop) for held in kept[name].ranges)
        elif getattr(parameter, "tensor_model_parallel", False) and size > 1:
            axis = parameter.partition_dim
            length = shape[axis]
            ranges, shape = ((rank * length, (rank + 1) * length),), (*shape[:axis], size * length, *shape[axis + 1 :])
        layer = next((prefix for prefix in layers if name.startswith(prefix)), "")
        whole = f"layer {layers[layer]}: {name.removeprefix(layer)}" if layer else name
        found[name] = Part(whole, shape, axis, ranges)
    return found


def _fill(parameter: Tensor, part: Part) -> None:
    """Noise; a mixer's parameters and the norms' weights keep what they are initialised with beside it."""
    generator = torch.Generator().manual_seed(zlib.crc32(part.name.encode()))
    noise = part.of(torch.randn(part.shape, generator=generator))
    parameter.copy_(parameter + 0.1 * noise if "mixer." in part.name or "layernorm" in part.name else 0.3 * noise)
