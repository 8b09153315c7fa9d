"""Real text as byte-pair tokens, whole chapters held out.

Letters: n tokens, V vocabulary.
"""

import os
from typing import NamedTuple

import torch
from torch import Tensor

from nsm_support.checks import check
from nsm_support.data import Split, Text, load_text, split_text
from nsm_support.extras import extra

with extra("checkpoints"):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SMALLEST = 256  #: tokens of a vocabulary: one for each byte


class Corpus(NamedTuple):
    """The chapters of each part, their tokens [n] int64 a chapter, and what made them."""

    text: Split[Text]
    tokens: Split[tuple[Tensor, ...]]
    tokenizer: Tokenizer

    @property
    def train(self) -> Tensor:
        """The training chapters one after the other [n]."""
        return torch.cat(self.tokens.train)


def train_tokenizer(content: str, vocab_size: int) -> Tokenizer:
    """Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) over bytes: any text has tokens, and gets back whole.

    Raises ValueError for a `vocab_size` below 256, or more than the text has pairs for.
    """
    check("train_tokenizer", vocab_size >= SMALLEST, f"at least {SMALLEST}, a token for each byte", vocab_size=vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([content], trainer)
    if (found := tokenizer.get_vocab_size()) < vocab_size:
        raise ValueError(f"vocab_size is {vocab_size}, but the text has pairs for {found} tokens only")
    return tokenizer


def encode(text: Text, tokenizer: Tokenizer) -> tuple[Tensor, ...]:
    """The tokens of each chapter, [n] int64. A chapter's last token is one of the line ends that part it from the next."""
    contents = [text.content[chapter.start : chapter.end] + "\n\n" for chapter in text.chapters]
    return tuple(torch.tensor(encoding.ids) for encoding in tokenizer.encode_batch(contents, add_special_tokens=False))


def load_corpus(
    path: str | os.PathLike[str] | None = None, *, vocab_size: int = 1024, tokenizer: Tokenizer | None = None
) -> Corpus:
    """The American Standard Version of 1901, or the text file at `path`, as tokens.

    The vocabulary is made from the training chapters alone, and does not depend on the held-out ones; or `tokenizer` is taken as
    it is. Which chapters are held out is always the same (`data.split_text`, a tenth each). Raises as `data.load_text`,
    `data.split_text`, `train_tokenizer`.
    """
    parts = split_text(load_text(path))
    tokenizer = tokenizer or train_tokenizer(parts.train.content, vocab_size)
    return Corpus(parts, Split(*(encode(part, tokenizer) for part in parts)), tokenizer)
