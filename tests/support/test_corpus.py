"""Text as tokens: nothing of it is lost, nothing of the held-out chapters is seen; and models that come back from a file."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsm_support.blockffn.model import BlockFFNConfig, BlockFFNModel
from nsm_support.data import load_text, split_text
from nsm_support.studies.corpus import load_corpus, load_trained, save_trained, train_tokenizer
from nsm_support.training import CheckpointError

SIZES = {"vocab_size": 300, "token_dim": 16, "num_layers": 2, "num_heads": 2, "num_experts": 4}
CORPUS = load_corpus(vocab_size=300)


def write(path, chapters):
    """A text file whose blocks of chapters are these: each is filled up to the length of one."""
    path.write_text("\n\n".join(chapters), encoding="utf-8")
    return path


def models(*seeds, **options):
    made = {}
    for seed in seeds:
        torch.manual_seed(seed)
        made[seed] = BlockFFNModel(BlockFFNConfig(**SIZES | options)).eval()
    return made


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
    assert "qzqz" in other.text.test.content and "qzqz" not in other.text.train.content


def test_a_tokenizer_that_is_given_is_taken():
    taken = load_corpus(vocab_size=999, tokenizer=CORPUS.tokenizer)
    assert taken.tokenizer is CORPUS.tokenizer and torch.equal(taken.train, CORPUS.train)


@pytest.mark.parametrize(("size", "message"), [(255, "at least 256"), (400, "pairs for 2.. tokens only")])
def test_a_vocabulary_that_cannot_be_is_refused(size, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer("a few words", size)


def test_models_come_back_bit_for_bit(tmp_path):
    saved = models(3, 0)
    save_trained(tmp_path / "models.pt", saved, CORPUS.tokenizer)
    found = load_trained(tmp_path / "models.pt")
    tokens = CORPUS.train[None, :40]
    assert list(found.models) == [3, 0] and found.tokenizer.to_str() == CORPUS.tokenizer.to_str()
    for seed, model in saved.items():
        assert not found.models[seed].training and found.models[seed].config == model.config
        state = found.models[seed].state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
        assert torch.equal(found.models[seed](tokens), model(tokens))
    assert not torch.equal(found.models[0](tokens), found.models[3](tokens))


def test_models_of_two_kinds_or_of_none_are_refused(tmp_path):
    two = {0: models(0)[0], 1: models(1, num_experts=5)[1]}
    for refused in ({}, two):
        with pytest.raises(ValueError, match="one config"):
            save_trained(tmp_path / "models.pt", refused, CORPUS.tokenizer)
    assert not (tmp_path / "models.pt").exists()


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "models.pt"
    with pytest.raises(FileNotFoundError):
        load_trained(path)
    save_trained(path, models(0), CORPUS.tokenizer)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        load_trained(path)
