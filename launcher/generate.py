"""Text from a trained model: the prompt in one pass, then one token at a time from the state.

Recurrent layers continue from a state of constant size; softmax layers keep their keys and values.

Legend: n tokens of the prompt, m tokens generated.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from longhaul.launcher.data.tokenizer import Tokenizer
from longhaul.models.errors import UserError
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import SequenceShard, WholeSequence


class Generator(Protocol):
    """What generation asks of a model: `LanguageModel`, or anything called in the same way."""

    def __call__(self, tokens: Tensor, shard: SequenceShard, state: Any = None) -> tuple[Tensor, Any]:
        """Hidden states [T, D] and the state after the last token."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, D] -> [n, vocabulary]."""
        ...


@torch.no_grad()
def generate_ids(
    model: Generator,
    prompt: Tensor,
    *,
    tokens: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    stop_id: int | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Continue one document.

    Args:
        model: on the device of `prompt`, whole in this process.
        prompt: int64 [n], n > 0.
        tokens: how many to generate, at most.
        temperature: of the softmax; 0 takes the likeliest token.
        top_k: draw from so many likeliest tokens.
        top_p: draw from the fewest likeliest tokens that hold this probability together.
        generator: on the CPU, where tokens are drawn.
        stop_id: the token that ends the text; it is not returned.
        vocab_size: ids from here on are never drawn (rows that only pad the embedding).

    Returns:
        int64 [m], m <= tokens.
    """
    _check(len(prompt), tokens, temperature, top_k, top_p)
    made: list[int] = []
    ids, position, state = prompt, 0, None
    while len(made) < tokens:
        documents = Documents((0, len(ids)), first_position=position)
        hidden, state = model(ids, WholeSequence(documents, ids.device, keep_state=True), state)
        logits = model.logits(hidden[-1:])[0, :vocab_size]  # [1, D] -> [vocabulary]
        token = draw(logits.float().cpu(), temperature, top_k, top_p, generator)
        if token == stop_id:
            break
        made.append(token)
        position += len(ids)
        ids = torch.tensor([token], device=prompt.device)
    return torch.tensor(made, dtype=torch.int64)


def draw(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None) -> int:
    """One token id from logits [vocabulary]."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None:
        least = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = (logits / temperature).softmax(-1)
    if top_p is not None:
        ordered, order = probabilities.sort(descending=True)
        # A token stays if those before it do not hold `top_p` yet: the likeliest one always does.
        dropped = order[ordered.cumsum(0) - ordered >= top_p]
        probabilities = probabilities.index_fill(0, dropped, 0.0)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def sample(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> str:
    """The text that a model puts after `prompt`, which is not repeated.

    Args:
        model: a `LanguageModel`, whole in this process (neither sharded nor under sequence parallelism).
        device: where the model is; that of its first parameter if left out.
        (the others): see `generate_ids`; `seed` fixes what is drawn.

    Raises:
        UserError: an option is out of range, or the prompt holds no token.
    """
    where = next(model.parameters()).device if device is None else torch.device(device)
    ids = torch.from_numpy(tokenizer.encode(prompt).copy()).to(where, torch.int64)
    training = model.training
    model.eval()
    try:
        made = generate_ids(
            model,  # type: ignore[arg-type]  # nn.Module says nothing of what its call returns
            ids,
            tokens=tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=torch.Generator().manual_seed(seed),
            stop_id=tokenizer.eod_id,
            vocab_size=tokenizer.vocab_size,
        )
    finally:
        model.train(training)
    return tokenizer.decode(made.tolist())


def printable(text: str) -> str:
    """Text without characters that would steer a terminal, which a model of bytes may well produce."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)


def _check(prompt: int, tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not prompt:
        raise UserError("The prompt holds no token: give at least one character to go on from.")
    if tokens < 0:
        raise UserError(f"--tokens is {tokens}: ask for 0 or more.")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"--temperature is {temperature}: give 0 (the likeliest token) or more.")
    if top_k is not None and top_k < 1:
        raise UserError(f"--top-k is {top_k}: give 1 or more, or leave it out.")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"--top-p is {top_p}: give a probability above 0 and at most 1, or leave it out.")


def main(argv: Sequence[str]) -> int:
    """`longhaul generate RUN_FOLDER --prompt ...`."""
    parser = argparse.ArgumentParser(prog="longhaul generate", description="Continue a text with a run's newest model.")
    parser.add_argument("folder", type=Path, help="the run's folder")
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-k", type=int, help="draw from so many likeliest tokens")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest tokens that hold this probability")
    parser.add_argument("--seed", type=int, default=0, help="fixes what is drawn (default: %(default)s)")
    options = parser.parse_args(argv)

    from longhaul.launcher.load import load_model  # brings in the checkpoint machinery, which --help does not need

    model, _, tokenizer = load_model(options.folder)
    text = sample(
        model, tokenizer, options.prompt, tokens=options.tokens, temperature=options.temperature,
        top_k=options.top_k, top_p=options.top_p, seed=options.seed,
    )  # fmt: skip
    print(options.prompt + printable(text))
    return 0
