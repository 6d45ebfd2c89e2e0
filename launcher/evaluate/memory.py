"""Memory fidelity: along the tokens (ETMF) and along the layers (ECLMF). docs/memmamba.md defines both.

With h^0 the embeddings and h^l the residual stream after block l, on held-out documents:

    ETMF(l, d)   a probe from h^l at token t + d back to block l's input h^(l-1) at token t
    ECLMF(l, G)  a probe from h^(l+G) at token t back to h^l at token t

Both work on any model: only what goes into and comes out of blocks is looked at.

Legend: T tokens of a document, D model width, l a block.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from longhaul.models.errors import UserError
from longhaul.models.lm import LanguageModel
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import WholeSequence

from .probe import Probe

RESULT = "memory_fidelity.json"


@torch.no_grad()
def hidden_states(model: LanguageModel, tokens: Tensor) -> list[Tensor]:
    """The residual stream of one document before the first block and after each, [T, D] each."""
    states: list[Tensor] = []
    hooks = [model.embedding.register_forward_hook(lambda module, inputs, out: states.append(out))]
    hooks += [layer.register_forward_hook(lambda module, inputs, out: states.append(out.x)) for layer in model.layers]
    try:
        model(tokens, WholeSequence(Documents((0, len(tokens))), tokens.device))
    finally:
        for hook in hooks:
            hook.remove()
    return states


def memory_fidelity(
    model: LanguageModel, documents: Sequence[Tensor], distances: Sequence[int], gaps: Sequence[int], ridge: float = 1e-3
) -> dict[str, Any]:
    """Both fidelities; every second document is judged, the others fit the probes.

    Args:
        documents: tokens, int64 [T] each.
        distances: d, in tokens, at least 1.
        gaps: G, in blocks, at least 1; those that the model is too shallow for are left out.
        ridge: see `Probe`.

    Returns:
        `token` {d: {l: fidelity}} and `layer` {G: {l: fidelity}} with their means `etmf` {d: mean} and `eclmf` {G: mean}
        over blocks; None where no document is long enough.
    """
    depth, width = model.config.num_layers, model.config.hidden_size
    gaps = [gap for gap in gaps if gap <= depth]
    token = {d: {block: Probe(width, ridge) for block in range(1, depth + 1)} for d in distances}
    layer = {gap: {block: Probe(width, ridge) for block in range(depth - gap + 1)} for gap in gaps}
    # All fitting comes before all judging.
    for judging, chosen in ((False, documents[::2]), (True, documents[1::2])):
        for tokens in chosen:
            h = hidden_states(model, tokens)
            for d, probes in token.items():
                for block, probe in probes.items():
                    pair = h[block][d:], h[block - 1][: max(0, len(tokens) - d)]
                    probe.judge(*pair) if judging else probe.fit(*pair)
            for gap, probes in layer.items():
                for block, probe in probes.items():
                    pair = h[block + gap], h[block]
                    probe.judge(*pair) if judging else probe.fit(*pair)

    def values(table: dict[int, dict[int, Probe]]) -> dict[int, dict[int, float | None]]:
        return {step: {block: probe.fidelity for block, probe in probes.items()} for step, probes in table.items()}

    result: dict[str, Any] = {"token": values(token), "layer": values(layer)}
    for name, source in (("etmf", "token"), ("eclmf", "layer")):
        result[name] = {step: _mean(of_block.values()) for step, of_block in result[source].items()}
    return result


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def tables(result: dict[str, Any]) -> list[tuple[str, Table]]:
    """Both fidelities for people, with titles: a row a block, a column a distance or gap, the mean last."""
    made = []
    for title, source, mean, letter in (
        ("Token memory fidelity (ETMF): a block's input, read from its output d tokens later", "token", "etmf", "d"),
        ("Layer memory fidelity (ECLMF): what a block gave, read G blocks later", "layer", "eclmf", "G"),
    ):
        table = Table()
        table.add_column("block", justify="right")
        columns = result[source]
        for step in columns:
            table.add_column(f"{letter} = {step}", justify="right")
        for block in sorted({block for column in columns.values() for block in column}):
            table.add_row(str(block), *(_number(column.get(block)) for column in columns.values()))
        table.add_section()
        table.add_row("mean", *(_number(value) for value in result[mean].values()))
        made.append((title, table))
    return made


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def main(argv: Sequence[str]) -> int:
    """`longhaul evaluate memory RUN_FOLDER`."""
    parser = argparse.ArgumentParser(
        prog="longhaul evaluate memory",
        description="How well linear probes read earlier tokens and earlier layers from a run's hidden states.",
    )
    parser.add_argument("folder", type=Path, help="the run's folder")
    parser.add_argument("--documents", type=int, default=32, help="held-out documents, half to fit (default: %(default)s)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a document at most (default: %(default)s)")
    parser.add_argument("--distances", type=int, nargs="+", default=[1, 8, 64, 256], help="d (default: %(default)s)")
    parser.add_argument("--gaps", type=int, nargs="+", default=[1, 2, 4], help="G (default: %(default)s)")
    parser.add_argument("--ridge", type=float, default=1e-3, help="of the probes (default: %(default)s)")
    parser.add_argument("--json", type=Path, help=f"where to write the numbers (default: {RESULT} in the run's folder)")
    options = parser.parse_args(argv)
    for name in ("distances", "gaps"):
        if min(getattr(options, name)) < 1:
            raise UserError(f"--{name} holds {min(getattr(options, name))}: give 1 or more.")
    if options.documents < 2 or options.length < 2 or options.ridge <= 0:
        raise UserError("--documents and --length must be at least 2, and --ridge above 0: probes are fitted and judged.")

    from longhaul.launcher.data.load import load_data  # what follows brings in machinery that --help does not need
    from longhaul.launcher.load import load_model

    model, config, _ = load_model(options.folder)
    corpus = load_data(config.data).held_out_corpus
    if corpus is None or len(corpus) < 2:
        found = 0 if corpus is None else len(corpus)
        raise UserError(f"The run holds out {found} documents and 2 are needed: train with data.validation_fraction above 0.")
    chosen = [corpus.document(index)[: options.length] for index in range(min(options.documents, len(corpus)))]
    documents = [torch.from_numpy(np.asarray(tokens, dtype=np.int64)) for tokens in chosen]
    result = memory_fidelity(model, documents, options.distances, options.gaps, options.ridge)
    result["documents"], result["tokens"] = len(documents), sum(map(len, documents))
    console = Console()
    for title, table in tables(result):
        console.print(title, table, sep="\n")
    path = options.json or options.folder / RESULT
    try:
        path.write_text(json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"The numbers cannot be written to {path} ({error.strerror}): give another --json.") from None
    print(f"{result['documents']} held-out documents, {result['tokens']:,} tokens; numbers in {path}")
    return 0
