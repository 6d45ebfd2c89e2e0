"""A trained model back from its run's folder, whole in one process."""

from __future__ import annotations

from pathlib import Path

from longhaul.models.errors import UserError
from longhaul.models.lm import LanguageModel
from longhaul.parallel.checkpoint import find, load

from .config import TrainConfig
from .data import Tokenizer, open_tokenizer
from .parsing import from_file
from .state import model_tensors

RESOLVED = "resolved_config.yaml"


def load_model(folder: str | Path) -> tuple[LanguageModel, TrainConfig, Tokenizer]:
    """The model of a run (its newest good checkpoint) or of one `step_N`, in evaluation mode on the CPU.

    Raises:
        UserError: there is no checkpoint, or it cannot be read.
    """
    path = Path(folder)
    checkpoint, _ = find(path) if path.is_dir() else (None, [])
    if checkpoint is None:
        raise UserError(f"There is no checkpoint in {path}: give the folder of a run (checkpoint.folder).")
    resolved = checkpoint.path / RESOLVED
    config = from_file(resolved if resolved.exists() else checkpoint.path.parent / RESOLVED)
    model = LanguageModel(config.model)
    load(checkpoint, model_tensors(model), together=False)
    model.eval()
    return model, config, open_tokenizer(config.data.tokenizer)
