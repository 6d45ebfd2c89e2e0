"""Every configuration that ships is read and built; every mixer and hybrid ratio fits every size of Linear-Llama3."""

import dataclasses
from pathlib import Path

import pytest
import torch

from longhaul.launcher.parsing import parse
from longhaul.models.config import LINEAR_MIXERS, ModelConfig
from longhaul.models.lm import LanguageModel

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
RATIOS = {"pure": "L", "1/8": "LLLLLLLN", "1/4": "LLLN", "1/2": "LN"}
SIZES = {"300m": (0.25e9, 1.0e9), "1b": (0.9e9, 3.0e9), "8b": (6.5e9, 16e9)}


def parameters_on_meta(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in LanguageModel(config).parameters())


def model_of(path: Path) -> ModelConfig:
    return parse(["--config", str(path)]).model


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_configuration_builds(path: Path) -> None:
    config = parse(["--config", str(path)])
    assert parameters_on_meta(config.model) > 50_000
    sequence = config.parallel.sequence_parallel_size
    assert config.resolve(sequence).parallel.sequence_parallel_size == sequence
    assert config.checkpoint.folder == f"runs/{path.stem}"


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("size", SIZES)
def test_every_mixer_fits_linear_llama3(size: str, ratio: str) -> None:
    base = model_of(CONFIGS[0].parent / f"linear_llama3_{size}.yaml")
    low, high = SIZES[size]
    for mixer in LINEAR_MIXERS:
        count = parameters_on_meta(dataclasses.replace(base, linear_mixer=mixer, pattern=RATIOS[ratio]))
        assert low < count < high, f"{mixer} at {ratio}: {count:,} parameters"


@pytest.mark.parametrize("size, low, high", [("370m", 0.35e9, 0.4e9), ("1.3b", 1.3e9, 1.4e9)])
def test_mamba2_has_the_published_size(size: str, low: float, high: float) -> None:
    assert low < parameters_on_meta(model_of(CONFIGS[0].parent / f"mamba2_{size}.yaml")) < high
