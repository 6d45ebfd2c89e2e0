"""Packed streams against a list of tokens walked one by one."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from longhaul.launcher.data import Corpus, PackedStreams, Stream, ValidationStreams, validation_streams
from longhaul.launcher.data.packing import shuffled

from .corpora import EOD, make_corpus

LENGTHS = {
    "mixed": [5, 1, 9, 2, 30, 1, 1, 4],
    "ones": [1] * 7,
    "one document": [13],
    "longer than several streams": [3, 50, 2],
    "exact fit": [6, 6, 12, 6],
}


def walk(corpus: Corpus, orders: list[np.ndarray], seq_length: int) -> list[tuple[list[int], ...]]:
    """The dull way: every (token, label, weight, position, document starts here) of the epochs, cut every T tokens."""
    row = []
    for order in orders:
        for d in order:
            document = corpus.document(int(d)).tolist()
            for position, token in enumerate(document):
                last = position == len(document) - 1
                row.append((token, 0 if last else document[position + 1], 0 if last else 1, position))
    streams: list[tuple[list[int], ...]] = []
    for begin in range(0, len(row), seq_length):
        tokens, labels, weights, positions = map(list, zip(*row[begin : begin + seq_length], strict=True))
        bounds = [t for t in range(len(tokens)) if t == 0 or positions[t] == 0] + [len(tokens)]
        streams.append((tokens, labels, weights, bounds, [positions[0]]))
    return streams


def plain(stream: Stream) -> tuple[list[int], ...]:
    assert stream.tokens.dtype == stream.labels.dtype == torch.int64 and stream.weights.dtype == torch.float32
    lists = stream.tokens.tolist(), stream.labels.tolist(), stream.weights.tolist()
    return *lists, list(stream.bounds), [stream.first_position]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("seq_length", [2, 6, 7, 100])
def test_streams_equal_a_walk_over_the_epochs(lengths: list[int], seq_length: int) -> None:
    corpus = make_corpus(lengths)
    streams = PackedStreams(corpus, seq_length, seed=3)
    orders = [shuffled(len(corpus), 3, epoch) for epoch in range(1 + 3 * seq_length // corpus.num_tokens + 3)]
    expected = [s for s in walk(corpus, orders, seq_length) if len(s[0]) == seq_length]
    assert len(expected) >= 3
    assert [plain(streams.stream(i)) for i in range(len(expected))] == expected


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_an_epoch_is_every_document_once(lengths: list[int]) -> None:
    corpus = make_corpus(lengths)
    seq_length = 2
    streams = PackedStreams(corpus, seq_length, seed=5)
    tokens = torch.cat([streams.stream(i).tokens for i in range(corpus.num_tokens + 1)])  # two epochs and more
    for epoch in range(2):
        found = tokens[epoch * corpus.num_tokens : (epoch + 1) * corpus.num_tokens].tolist()
        documents, begin = [], 0
        for end, token in enumerate(found, start=1):
            if token == EOD:
                documents.append(tuple(found[begin:end]))
                begin = end
        assert begin == len(found)
        assert sorted(documents) == sorted(tuple(corpus.document(d).tolist()) for d in range(len(corpus)))


def test_a_long_document_goes_on_where_it_stopped() -> None:
    corpus = make_corpus([20])
    first, second, third = (PackedStreams(corpus, 8, seed=1).stream(i) for i in range(3))
    assert (first.first_position, second.first_position, third.first_position) == (0, 8, 16)
    assert first.labels[-1] == second.tokens[0] and first.weights[-1] == 1
    assert third.bounds == (0, 4, 8)  # its last four tokens, then the next epoch
    assert third.weights.tolist() == [1, 1, 1, 0, 1, 1, 1, 1] and third.labels[3] == 0


def test_a_document_that_ends_with_the_stream_leaves_the_next_one_fresh() -> None:
    streams = PackedStreams(make_corpus([6]), 6, seed=1)
    assert [streams.stream(i).first_position for i in range(3)] == [0, 0, 0]
    assert [streams.stream(i).weights[-1].item() for i in range(3)] == [0, 0, 0]


def test_random_access_equals_sequential() -> None:
    corpus = make_corpus([5, 1, 9, 2, 30, 1, 1, 4])
    sequential = PackedStreams(corpus, 7, seed=2)
    expected = [plain(sequential.stream(i)) for i in range(60)]
    jumping = PackedStreams(corpus, 7, seed=2)
    for i in np.random.default_rng(0).permutation(60).tolist():
        assert plain(jumping.stream(i)) == expected[i]
    assert plain(PackedStreams(corpus, 7, seed=2).stream(59)) == expected[59]  # as after a resume


def test_far_samples_need_no_walk() -> None:
    corpus = make_corpus([5, 9])
    streams = PackedStreams(corpus, 7, seed=2)
    assert plain(streams.stream(2 * 10**12)) == plain(_at(corpus, 7 * 2 * 10**12, 7, seed=2))
    assert streams.epochs(4) == 2.0


def _at(corpus: Corpus, offset: int, seq_length: int, seed: int) -> Stream:
    epoch, begin = divmod(offset, corpus.num_tokens)
    assert begin == 0  # 7 divides the epoch, so the sample begins with one
    return ValidationStreams(corpus.select(shuffled(len(corpus), seed, epoch)), seq_length)[0]


def test_epochs_and_seeds_shuffle_differently() -> None:
    orders = [shuffled(50, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_is_the_same_in_another_process_and_version() -> None:
    script = "from longhaul.launcher.data.packing import shuffled; print(*shuffled(8, 1, 2))"
    again = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert again.split() == [str(d) for d in shuffled(8, 1, 2)]
    assert shuffled(8, 1, 2).tolist() == [5, 6, 3, 2, 1, 0, 4, 7]


def test_the_fingerprint_names_documents_length_and_seed() -> None:
    def fingerprint(lengths: list[int], seq_length: int, seed: int) -> str:
        return PackedStreams(make_corpus(lengths), seq_length, seed).fingerprint

    same = fingerprint([3, 4], 8, 1)
    assert fingerprint([3, 4], 8, 1) == same
    assert len({same, fingerprint([4, 3], 8, 1), fingerprint([3, 4], 9, 1), fingerprint([3, 4], 8, 2)}) == 4


def test_a_negative_sample_is_refused() -> None:
    with pytest.raises(IndexError, match="-1"):
        PackedStreams(make_corpus([3]), 2, seed=1).stream(-1)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("seq_length", [1, 6, 100])
def test_validation_reads_each_token_once_without_padding(lengths: list[int], seq_length: int) -> None:
    corpus = make_corpus(lengths)
    streams = ValidationStreams(corpus, seq_length)
    expected = walk(corpus, [np.arange(len(corpus))], seq_length)
    assert [plain(stream) for stream in streams] == expected
    assert len(streams) == len(expected)
    assert [plain(streams[i - len(streams)]) for i in range(len(streams))] == expected
    assert [plain(stream) for stream in streams[::2]] == expected[::2]
    with pytest.raises(IndexError):
        streams[len(streams)]


@pytest.mark.parametrize("limit", [1, 4, 8, 11, 12, 10**6])
def test_a_limit_ends_validation_early_and_keeps_the_labels(limit: int) -> None:
    corpus = make_corpus([5, 2, 9])
    everything = list(validation_streams(corpus, 4))
    limited = list(validation_streams(corpus, 4, limit))
    tokens = torch.cat([s.tokens for s in limited])
    assert tokens.tolist() == torch.cat([s.tokens for s in everything]).tolist()[:limit]
    for short, whole in zip(limited, everything, strict=False):
        n = len(short.tokens)
        assert short.bounds[-1] == n
        assert short.labels.tolist() == whole.labels.tolist()[:n]
        assert short.weights.tolist() == whole.weights.tolist()[:n]
