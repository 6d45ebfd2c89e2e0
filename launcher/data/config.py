"""What a person may say about the data of a run."""

from __future__ import annotations

from dataclasses import dataclass

from longhaul.models.errors import UserError

ON_BAD_DOCUMENT = ("error", "skip")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where documents come from, how they become tokens and how tokens become streams."""

    paths: tuple[str, ...] = ()
    """Files or folders (.txt, .md, .py, .jsonl, .jsonl.gz, .parquet). None, or the word python-stdlib: the sources of
    Python's own standard library as found on this machine."""

    tokenizer: str = "byte"
    """`byte`, or the path of a Hugging Face tokenizer.json (or of the folder that holds it)."""

    text_field: str = "text"
    """Field of a .jsonl line, or column of a .parquet file, that holds the document."""

    seq_length: int = 8192
    """Tokens in one packed stream."""

    validation_fraction: float = 0.02
    """Share of the documents held out of training; 0 holds out none."""

    validation_tokens: int = 262144
    """At most this many held-out tokens are evaluated."""

    seed: int = 1
    """Seed of the split and of the order of documents in every epoch."""

    cache_dir: str | None = None
    """Folder for tokenised documents; by default longhaul/tokens in the user's cache folder."""

    on_bad_document: str = "error"
    """A document that cannot be read: `error` stops before the first step, `skip` leaves it out and counts it."""

    carry_state: bool = False
    """A document continued from the stream before starts from the state it ended with, not from a fresh one."""

    repeat_context: int = 0
    """The first so many tokens of every document are said twice, and are no targets the second time (JRT-Prompt)."""

    prefix_length: int = 0
    """JRT's loss: the first so many tokens of every document are learnt by restoring masked ones, the others as the next token.
    What a stream begins with is a document then, also if its start is in the stream before. 0: next tokens everywhere."""

    mask_rate: float = 0.15
    """Share of a prefix's tokens that are masked."""

    mask_weight: float = 0.25
    """What the masked tokens of a prefix count together, times its tokens; a token behind the prefix counts 1."""

    def __post_init__(self) -> None:
        if isinstance(self.paths, str):
            raise UserError(f"data.paths must be a list, not the string {self.paths!r}: write [{self.paths!r}].")
        if not self.tokenizer:
            raise UserError("data.tokenizer is empty: give byte or the path of a tokenizer.json.")
        if not self.text_field:
            raise UserError("data.text_field is empty: give the field that holds the text of a document.")
        if self.seq_length < 2:
            raise UserError(f"data.seq_length is {self.seq_length}: a stream needs at least 2 tokens.")
        if not 0 <= self.validation_fraction < 1:
            raise UserError(
                f"data.validation_fraction is {self.validation_fraction}: give a share of the documents, at least 0 "
                "and below 1."
            )
        if self.validation_tokens < 2:
            raise UserError(
                f"data.validation_tokens is {self.validation_tokens}: give at least 2, or set data.validation_fraction "
                "to 0 to hold out nothing."
            )
        if self.seed < 0:
            raise UserError(f"data.seed is {self.seed}: give 0 or a positive number.")
        if self.on_bad_document not in ON_BAD_DOCUMENT:
            raise UserError(f"data.on_bad_document is {self.on_bad_document!r}: give error or skip.")
        if self.repeat_context < 0:
            raise UserError(f"data.repeat_context is {self.repeat_context}: give 0 (nothing is repeated) or more tokens.")
        if not 0 <= self.prefix_length < self.seq_length:
            raise UserError(
                f"data.prefix_length is {self.prefix_length}: give 0 or more, and less than data.seq_length "
                f"{self.seq_length}, so that there are tokens behind it."
            )
        if not 0 < self.mask_rate <= 1:
            raise UserError(f"data.mask_rate is {self.mask_rate}: give a share of the tokens, above 0 and at most 1.")
        if not 0 <= self.mask_weight < float("inf"):
            raise UserError(f"data.mask_weight is {self.mask_weight}: give 0 or more.")
        if self.prefix_length and self.carry_state:
            raise UserError(
                f"data.prefix_length {self.prefix_length} cannot be had with data.carry_state: a prefix is read as a whole, so "
                "every stream begins anew; leave one of the two out."
            )
