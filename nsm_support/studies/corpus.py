"""Real text as byte-pair tokens, whole chapters held out, and models of it as files that other pages read.

Letters: n tokens, V vocabulary.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nsm_support.blockffn.model import BlockFFNConfig, BlockFFNModel
from nsm_support.data import Split, Text, load_text, split_text
from nsm_support.extras import extra
from nsm_support.training import load_model, save_model

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


class Trained(NamedTuple):
    """Models of a text by the seed that they began with, all of one config, in eval mode; and the text's tokenizer."""

    models: dict[int, BlockFFNModel]
    tokenizer: Tokenizer


def train_tokenizer(content: str, vocab_size: int) -> Tokenizer:
    """Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) over bytes: any text has tokens, and gets back whole.

    Raises:
        ValueError: for a `vocab_size` below 256, or more than the text has pairs for.
    """
    if vocab_size < SMALLEST:
        raise ValueError(f"vocab_size is at least {SMALLEST}, a token for each byte; got {vocab_size!r}")
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
    return tuple(torch.tensor(one.ids) for one in tokenizer.encode_batch(contents, add_special_tokens=False))


def load_corpus(
    path: str | os.PathLike[str] | None = None, *, vocab_size: int = 1024, tokenizer: Tokenizer | None = None
) -> Corpus:
    """The American Standard Version of 1901, or the text file at `path`, as tokens.

    The vocabulary is made from the training chapters alone, and does not depend on the held-out ones; or `tokenizer` is
    taken as it is. Which chapters are held out is always the same (`data.split_text`, a tenth each).

    Raises:
        As `data.load_text`, `data.split_text`, `train_tokenizer`.
    """
    parts = split_text(load_text(path))
    tokenizer = tokenizer or train_tokenizer(parts.train.content, vocab_size)
    return Corpus(parts, Split(*(encode(part, tokenizer) for part in parts)), tokenizer)


def save_trained(path: str | os.PathLike[str], models: Mapping[int, BlockFFNModel], tokenizer: Tokenizer) -> None:
    """Write models of one config, and their tokenizer, in one file, whole or not at all.

    Raises:
        ValueError: if there is no model, or configs differ.
    """
    configs = [model.config for model in models.values()]
    if not configs or any(config != configs[0] for config in configs):
        raise ValueError(f"one or more models of one config can be saved together; got {configs}")
    together = nn.ModuleDict({str(seed): model for seed, model in models.items()})
    about = {"config": asdict(configs[0]), "seeds": list(models), "tokenizer": tokenizer.to_str()}
    save_model(path, together, about)


def load_trained(path: str | os.PathLike[str]) -> Trained:
    """What `save_trained` wrote. Raises FileNotFoundError, or `training.CheckpointError` for a damaged file."""
    about = {}

    def build(metadata: dict) -> nn.ModuleDict:
        about.update(metadata)
        config = BlockFFNConfig(**metadata["config"])
        return nn.ModuleDict({str(seed): BlockFFNModel(config) for seed in metadata["seeds"]})

    together = load_model(path, build).eval()
    return Trained({seed: together[str(seed)] for seed in about["seeds"]}, Tokenizer.from_str(about["tokenizer"]))
