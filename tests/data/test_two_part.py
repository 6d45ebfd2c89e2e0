"""JRT's data: contexts said twice, and prefixes learnt from masks, the same however they are read."""

from itertools import accumulate

import numpy as np
import pytest
import torch

from longhaul.launcher.data import DataConfig, PackedStreams, Stream, ValidationStreams
from longhaul.launcher.data.packing import shuffled
from longhaul.launcher.data.two_part import TwoPart
from longhaul.models.errors import UserError
from longhaul.models.mixers.jrt import repeat_context

from .corpora import EOD, make_corpus

LENGTHS = [5, 1, 9, 2, 30, 1, 1, 4]
PREFIX, MASK = 6, 100
OBJECTIVE = TwoPart(prefix_length=PREFIX, mask_id=MASK, rate=0.3, weight=0.25, seed=4)


@pytest.mark.parametrize("repeat", (0, 1, 4, 100))
def test_streams_of_repeated_contexts(repeat: int) -> None:
    corpus = make_corpus(LENGTHS)
    streams = PackedStreams(corpus, 7, seed=3, repeat=repeat)
    documents = [torch.from_numpy(corpus.document(int(d)).astype(np.int64)) for d in shuffled(len(corpus), 3, 0)]
    said = [repeat_context(document, min(repeat, len(document) - 1)) for document in documents]
    tokens, labels, weights = (torch.cat(parts) for parts in zip(*said))
    bounds = list(accumulate((len(one.tokens) for one in said), initial=0))
    assert streams.tokens_per_epoch == len(tokens) == sum(LENGTHS) + sum(min(repeat, n - 1) for n in LENGTHS)
    labels = torch.where(torch.isin(torch.arange(len(tokens)) + 1, torch.tensor(bounds)), 0, labels)
    for index in range(len(tokens) // 7):
        stream, cut = streams.stream(index), slice(7 * index, 7 * index + 7)
        assert stream.tokens.equal(tokens[cut]) and stream.labels.equal(labels[cut]) and stream.weights.equal(weights[cut])
        assert stream.first_position == 7 * index - max(bound for bound in bounds if bound <= 7 * index)
    assert (tokens == EOD).sum() == len(LENGTHS), "the end of a document is never repeated"
    held_out = ValidationStreams(corpus, 1000, repeat=repeat)
    assert held_out.num_tokens == streams.tokens_per_epoch
    assert held_out[0].weights.sum() == sum(LENGTHS) - len(LENGTHS), "what counts is what was there"


def plain(stream: Stream) -> list[list[float]]:
    return [tensor.tolist() for tensor in (stream.tokens, stream.labels, stream.weights)]


def test_masks_follow_from_the_samples_number() -> None:
    corpus = make_corpus(LENGTHS)
    streams, again = (PackedStreams(corpus, 20, seed=1, objective=OBJECTIVE) for _ in range(2))
    forwards = [plain(streams.stream(i)) for i in range(6)]
    assert [plain(again.stream(i)) for i in reversed(range(6))] == forwards[::-1]
    one = PackedStreams(make_corpus([1000]), 20, seed=1, objective=OBJECTIVE)
    places = {tuple((one.stream(i).tokens == MASK).nonzero()[:, 0].tolist()) for i in range(9)}
    assert len(places) > 3, "other samples, other masks"


def test_what_a_stream_begins_with_is_a_document() -> None:
    corpus = make_corpus([50])
    usual = PackedStreams(corpus, 20, seed=1)
    asked = PackedStreams(corpus, 20, seed=1, objective=OBJECTIVE)
    for index in range(2):
        before, stream = usual.stream(index), asked.stream(index)
        assert (before.first_position, stream.first_position) == (20 * index, 0)
        assert stream.tokens[PREFIX:].equal(before.tokens[PREFIX:])
        assert stream.labels[PREFIX - 1 :].equal(before.labels[PREFIX - 1 :])
        assert stream.weights[PREFIX - 1 :].equal(before.weights[PREFIX - 1 :]), "the last label lies in the next stream"
        masked = stream.tokens != before.tokens
        assert masked.any() and stream.labels[masked].equal(before.tokens[masked])
        assert stream.weights[: PREFIX - 1].sum() == 0.25 * PREFIX and not masked[PREFIX - 1 :].any()


def test_held_out_streams_ask_for_the_next_token_behind_prefixes() -> None:
    corpus = make_corpus([30, 4, 20])
    usual, asked = ValidationStreams(corpus, 100), ValidationStreams(corpus, 100, objective=OBJECTIVE)
    before, stream = usual[0], asked[0]
    assert stream.tokens.equal(before.tokens) and stream.labels.equal(before.labels)
    inside = [*range(PREFIX - 1), *range(30, 34), *range(34, 34 + PREFIX - 1)]
    assert not stream.weights[inside].any()
    outside = [t for t in range(54) if t not in inside]
    assert stream.weights[outside].equal(before.weights[outside])


def test_samples_of_another_objective_are_others() -> None:
    corpus = make_corpus(LENGTHS)
    prints = {
        PackedStreams(corpus, 20, seed=1, repeat=repeat, objective=objective).fingerprint
        for repeat in (0, 3)
        for objective in (None, OBJECTIVE, TwoPart(prefix_length=PREFIX, mask_id=MASK, rate=0.2, weight=0.25, seed=4))
    }
    assert len(prints) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"repeat_context": -1}, "repeat_context is -1"),
        ({"prefix_length": 8192}, "prefix_length is 8192"),
        ({"prefix_length": -2}, "prefix_length is -2"),
        ({"mask_rate": 0.0}, "mask_rate is 0"),
        ({"mask_weight": -1.0}, "mask_weight is -1"),
        ({"prefix_length": 4, "carry_state": True}, "carry_state"),
    ),
)
def test_impossible_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataConfig(**options)
