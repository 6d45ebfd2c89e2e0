"""What a finished run leaves for a person: a generated sample and the report."""

from __future__ import annotations

from pathlib import Path

from longhaul.parallel.checkpoint import steps_in, write_atomically

from .data import Data
from .generate import sample
from .load import load_model
from .report import write_report

PROMPT_TOKENS = 64
SAMPLE_TOKENS = 300


def write_results(folder: Path, data: Data) -> Path:
    """Write `sample.txt` (if there is a checkpoint to sample from) and the report; returns the report's path."""
    if steps_in(folder):
        model, _, tokenizer = load_model(folder)
        corpus = data.held_out_corpus if data.held_out_corpus is not None else data.train_corpus
        prompt = tokenizer.decode(corpus.document(0)[:-1][:PROMPT_TOKENS].tolist())
        text = sample(model, tokenizer, prompt, tokens=SAMPLE_TOKENS)
        write_atomically(folder / "sample.txt", f"prompt: {prompt}\n\n{text}\n")
    return write_report(folder)
