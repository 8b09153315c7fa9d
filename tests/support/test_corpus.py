"""Text as tokens: nothing of it is lost, nothing of the held-out chapters is seen."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsm_support.corpus import load_corpus, train_tokenizer
from nsm_support.data import load_text, split_text

CORPUS = load_corpus(vocab_size=300)


def write(path, chapters):
    """A text file whose blocks of chapters are these: each is filled up to the length of one."""
    path.write_text("\n\n".join(chapters), encoding="utf-8")
    return path


@given(st.text())
def test_any_text_comes_back_from_its_tokens(text):
    assert CORPUS.tokenizer.decode(CORPUS.tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_tokens_are_the_chapters_with_a_line_end():
    assert [len(part) for part in CORPUS.tokens] == [951, 119, 119]
    for part, tokens in zip(CORPUS.text, CORPUS.tokens, strict=True):
        for chapter, one in list(zip(part.chapters, tokens, strict=True))[::25]:
            assert CORPUS.tokenizer.decode(one.tolist()) == part.content[chapter.start : chapter.end] + "\n\n"
            assert one.dtype == torch.int64 and int(one.max()) < 300
    assert torch.equal(CORPUS.train[:50], CORPUS.tokens.train[0][:50])
    assert len(CORPUS.train) == sum(map(len, CORPUS.tokens.train))


def test_pairs_are_merged_by_how_often_they_occur():
    tokenizer = train_tokenizer("xyz " * 10 + "xy " * 5, 259)  # xy 15 times, then " xy" 14, then " xyz" 9
    assert [tokenizer.decode([i]) for i in range(256, 259)] == ["xy", " xy", " xyz"]


def test_the_vocabulary_never_sees_held_out_chapters(tmp_path):
    """A pair of letters that only held-out chapters have, as often as anything: no token is made of it."""
    texts = ["plain words of a chapter " * 150 for _ in range(20)]
    names = [c.name for c in split_text(load_text(write(tmp_path / "plain.txt", texts))).train.chapters]
    held = [i for i in range(20) if f"block {i + 1}" not in names]
    assert len(held) == 4
    marked = ["qzqz qzqz qzqz qzqz words" * 150 if i in held else text for i, text in enumerate(texts)]
    path = write(tmp_path / "marked.txt", marked)
    plain, other = (load_corpus(one, vocab_size=270) for one in (tmp_path / "plain.txt", path))
    assert other.tokenizer.get_vocab() == plain.tokenizer.get_vocab()
    assert not any("qz" in token for token in other.tokenizer.get_vocab())
    # Had it seen them, there would be one
    assert any("qz" in token for token in train_tokenizer(load_text(path).content, 270).get_vocab())
    given = load_corpus(path, vocab_size=999, tokenizer=plain.tokenizer)
    assert given.tokenizer is plain.tokenizer and torch.equal(given.train, other.train), "a tokenizer that is given is taken"
    assert "qzqz" in other.text.test.content and "qzqz" not in other.text.train.content


@pytest.mark.parametrize(("size", "message"), [(255, "at least 256"), (400, "pairs for 2.. tokens only")])
def test_a_vocabulary_that_cannot_be_is_refused(size, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer("a few words", size)
