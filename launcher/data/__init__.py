"""Documents in, packed streams out."""

from .baseline import byte_unigram_nats, token_counts
from .config import DataConfig
from .corpus import Corpus, CorpusSummary, describe, open_corpus
from .load import Data, load_data
from .packing import PackedStreams, Stream, ValidationStreams, validation_streams
from .split import split_corpus
from .tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, open_tokenizer

__all__ = [
    "ByteTokenizer",
    "Corpus",
    "CorpusSummary",
    "Data",
    "DataConfig",
    "FileTokenizer",
    "PackedStreams",
    "Stream",
    "Tokenizer",
    "ValidationStreams",
    "byte_unigram_nats",
    "describe",
    "load_data",
    "open_corpus",
    "open_tokenizer",
    "split_corpus",
    "token_counts",
    "validation_streams",
]
