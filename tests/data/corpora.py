"""Small corpora, built without a disk."""

from collections.abc import Sequence

import numpy as np

from longhaul.launcher.data import Corpus

EOD = 99


def make_corpus(lengths: Sequence[int]) -> Corpus:
    """Documents of these lengths, the last token of each `EOD` and no two tokens of the rest equal in neighbours."""
    documents = [[(7 * d + 3 * t) % 97 for t in range(n - 1)] + [EOD] for d, n in enumerate(lengths)]
    sizes = np.asarray(lengths, dtype=np.int64)
    return Corpus(
        tokens=np.asarray([token for document in documents for token in document], dtype=np.uint8),
        starts=np.cumsum(sizes) - sizes,
        lengths=sizes,
        keys=np.arange(1, len(lengths) + 1, dtype=np.uint64),
        fingerprint=f"made of {list(lengths)}",
    )
