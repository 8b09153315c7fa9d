"""A training of a language model, its measures against loops written out, and models that come back from their file."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nsm_support.blockffn.model import BlockFFNConfig, BlockFFNModel, dense_twin
from nsm_support.studies import language_model
from nsm_support.studies.language_model import (
    LanguageModelRun,
    chapter_losses,
    load_trained,
    read_corpus,
    read_windows,
    routing_measures,
    save_trained,
    windows,
)
from nsm_support.studies.protocol import measure

V = 270
CONFIG = BlockFFNConfig(
    vocab_size=V,
    token_dim=16,
    num_layers=2,
    num_heads=2,
    num_experts=6,
    expert_size=4,
    dim_model_base=16,
    locality_weight=1e-3,
    chunk_sparsity_weight=5e-2,
)
WORDS = "the lord said unto his people go and see what the king of all that land has done before us this day"


def draw(*shape, below=5, seed=0):
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The path of a file of 30 chapters of words at random."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    lines = [" ".join(WORDS.split()[i] for i in row) for row in draw(400, 60, below=len(WORDS.split()), seed=1).tolist()]
    path.write_text("\n\n".join(lines))
    return str(path)


@pytest.fixture(scope="module")
def run(text):
    return LanguageModelRun(
        model=CONFIG, text=text, seed=3, window=64, batch_size=2, steps=40, records=2, validated=5, held_out=3
    )


@pytest.fixture(scope="module")
def trained(run):
    return measure(run)


def test_windows_are_the_chapters_one_after_the_other():
    inputs, targets = windows([torch.arange(5), torch.arange(5, 11)], 3)
    assert inputs.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]] and targets.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    with pytest.raises(ValueError, match="takes 12 tokens; the chapters have 11"):
        windows([torch.arange(11)], 11)


def test_measures_of_routing_are_what_they_say():
    scores = [F.relu(torch.randn(3, 70, 6, generator=torch.Generator().manual_seed(seed)) - 1) for seed in (0, 1)]
    scores[1][..., 2] = 0  # a dead block
    found = routing_measures(scores)
    used = [{(b, t, e) for b, t, e in layer.nonzero().tolist()} for layer in scores]

    def share(size, blocks):  # of chunk × block without a token that uses the block
        unused = []
        for layer, alive in zip(used, blocks, strict=True):
            chunks = [(b, first, e) for b in range(3) for first in range(0, 70 - size + 1, size) for e in alive]
            hit = [any((b, t, e) in layer for t in range(first, first + size)) for b, first, e in chunks]
            unused.append(1 - sum(hit) / len(hit))
        return sum(unused) / 2

    everything, alive = [range(6)] * 2, [range(6), [0, 1, 3, 4, 5]]
    for blocks, ending in ((everything, ""), (alive, "_alive")):
        assert found[f"token_sparsity{ending}"] == pytest.approx(share(1, blocks), abs=1e-6)
        for size in (8, 64):
            assert found[f"chunk_{size}_sparsity{ending}"] == pytest.approx(share(size, blocks), abs=1e-6)
            chances = [
                math.comb(210 - len({place[:2] for place in layer if place[2] == e}), size) / math.comb(210, size)
                for layer, alive in zip(used, blocks, strict=True)
                for e in alive
            ]
            halves = chances[: len(blocks[0])], chances[len(blocks[0]) :]
            mean = sum(sum(half) / len(half) for half in halves) / 2
            assert found[f"chunk_{size}_scattered{ending}"] == pytest.approx(mean, rel=1e-9)
    assert found["dead_experts"] == 1 and found["token_sparsity_alive"] < found["token_sparsity"]
    assert len(found) == 11
    with pytest.raises(ValueError, match="no block for any token"):
        routing_measures([scores[0], torch.zeros(3, 70, 6)])


def test_windows_are_read_as_the_model_reads_them():
    torch.manual_seed(0)
    model = BlockFFNModel(CONFIG).eval()
    tokens = draw(7, 65, below=V)
    loss, scores = read_windows(model, tokens[:, :-1], tokens[:, 1:], batch_size=3)
    logits, routing = model.trace(tokens[:, :-1])
    assert loss == pytest.approx(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item(), rel=1e-5)
    for one, routed in zip(scores, routing, strict=True):
        torch.testing.assert_close(one, routed.scores)
    dense = BlockFFNModel(dense_twin(CONFIG, 2)).eval()
    assert read_windows(dense, tokens[:, :-1], tokens[:, 1:])[1] == []


def test_chapters_are_scored_each_by_itself():
    torch.manual_seed(0)
    model = BlockFFNModel(CONFIG).eval()
    chapters = [draw(n, below=V, seed=n) for n in (11, 2)]
    found = chapter_losses(model, chapters, 4)
    # Windows begin at 0, 2, 4, …: token 7 (of 11) is read with 4, 5 and 6 before it, token 6 with 2 to 5
    for chapter, place, first in ((0, 7, 4), (0, 6, 2), (0, 3, 0), (1, 1, 0)):
        log_p = model(chapters[chapter][None, first:place])[0, -1].log_softmax(-1)
        assert found[chapter][place - 1].item() == pytest.approx(-log_p[chapters[chapter][place]].item(), rel=1e-5)
    assert [len(one) for one in found] == [10, 1]


def test_what_training_says_of_the_model_is_so(run, trained):
    corpus = read_corpus(run.text, V)
    assert [record["step"] for record in trained.history] == [0, 20, 40]
    first, last = trained.history[0], trained.history[-1]
    assert first["validation_loss"] == pytest.approx(math.log(V), rel=0.05)
    assert first["token_sparsity"] == pytest.approx(0.5, abs=0.1)
    assert last["validation_loss"] < 0.8 * first["validation_loss"]
    model = trained.model()
    for found, wanted in zip(chapter_losses(model, corpus.tokens.test[:3], 64), trained.tensors["losses"], strict=True):
        assert torch.equal(found, wanted)
    loss, scores = read_windows(model, *windows(corpus.tokens.test[:3], 64))
    (row,) = trained.rows
    assert row == {"seed": 3, "part": "test", "loss": loss, **routing_measures(scores), "seconds": row["seconds"]}
    inputs, targets = windows(corpus.tokens.validation, 64)
    chosen = torch.linspace(0, len(inputs) - 1, 5).long()
    assert last["validation_loss"] == read_windows(model, inputs[chosen], targets[chosen])[0]


def test_training_reads_no_held_out_chapter(run, trained, monkeypatch):
    corpus = read_corpus(run.text, V)
    tokens = corpus.tokens._replace(
        test=tuple(one.flip(0) for one in corpus.tokens.test), validation=tuple(one.flip(0) for one in corpus.tokens.validation)
    )
    monkeypatch.setattr(language_model, "read_corpus", lambda *_: corpus._replace(tokens=tokens))
    found = measure(run)
    assert all(torch.equal(value, found.state[name]) for name, value in trained.state.items())
    assert found.history[-1]["validation_loss"] != trained.history[-1]["validation_loss"]
    assert not torch.equal(found.tensors["losses"][0], trained.tensors["losses"][0])


def models(*seeds, **options):
    made = {}
    for seed in seeds:
        torch.manual_seed(seed)
        made[seed] = BlockFFNModel(replace(CONFIG, **options)).eval()
    return made


def test_models_come_back_bit_for_bit(text, tmp_path):
    corpus = read_corpus(text, V)
    saved = models(3, 0)
    save_trained(tmp_path / "models.pt", saved, corpus.tokenizer)
    found = load_trained(tmp_path / "models.pt")
    tokens = corpus.train[None, :40]
    assert list(found.models) == [3, 0] and found.tokenizer.to_str() == corpus.tokenizer.to_str()
    for seed, model in saved.items():
        assert not found.models[seed].training and found.models[seed].config == model.config
        state = found.models[seed].state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
        assert torch.equal(found.models[seed](tokens), model(tokens))
    assert not torch.equal(found.models[0](tokens), found.models[3](tokens))


def test_models_of_two_kinds_or_of_none_are_refused(text, tmp_path):
    two = {0: models(0)[0], 1: models(1, num_experts=5)[1]}
    for refused in ({}, two):
        with pytest.raises(ValueError, match="one config"):
            save_trained(tmp_path / "models.pt", refused, read_corpus(text, V).tokenizer)
    assert not (tmp_path / "models.pt").exists()
