"""A training that comes again bit for bit, its measures against loops written out, and the counters beside it."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nsm_support.blockffn.model import BlockFFNConfig, BlockFFNModel, dense_twin
from nsm_support.ngrams import kneser_ney
from nsm_support.studies import language_model as experiment
from nsm_support.studies.language_model import Run, chapter_losses, read_corpus, read_windows, routing_measures, train, windows

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
    return Run(model=CONFIG, text=text, seed=3, window=64, batch_size=2, steps=40, records=2, validated=5, held_out=3)


@pytest.fixture(scope="module")
def trained(run):
    return train(run)


def by_the_formula(train, test, V, order):
    """Kneser–Ney, one token at a time: dictionaries, no vectors."""

    def occurrences(m):  # a Counter of (context, token)
        return Counter((tuple(one[i - m : i]), one[i]) for one in train for i in range(m, len(one)))

    levels = []
    for m in range(order):
        levels.append(occurrences(m) if m == order - 1 else Counter((c[1:], t) for c, t in occurrences(m + 1)))

    def probability(context, token):
        m = len(context)
        shorter = probability(context[1:], token) if m else 1 / V
        counts = levels[m]
        after = {t: n for (c, t), n in counts.items() if c == context}
        if not after:
            return shorter
        times = Counter(counts.values())
        once = max(times[1], 1)
        d = once / (once + 2 * times[2])
        return (max(after.get(token, 0) - d, 0) + d * len(after) * shorter) / sum(after.values())

    return [[-math.log(probability(tuple(one[max(0, i - order + 1) : i]), one[i])) for i in range(1, len(one))] for one in test]


@pytest.mark.parametrize("order", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("below", [9, 3])  # of 3 letters, 0 to 0 to 1, every context that crosses a chapter's end is known
def test_counting_is_the_formula(order, below):
    chapters = [draw(n, below=below, seed=n).pow(2) // 4 for n in (40, 2, 31)]  # 0 … 16, some of them never
    test = [draw(n, below=below, seed=n).pow(2) // 4 for n in (2, 3, 50)]
    found = kneser_ney(chapters, test, 17, order=order)
    wanted = by_the_formula([c.tolist() for c in chapters], [c.tolist() for c in test], 17, order)
    assert [len(one) for one in found] == [1, 2, 49]
    for one, plain in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, torch.tensor(plain, dtype=torch.float64), rtol=1e-12, atol=0)


def test_counted_probabilities_sum_to_one():
    chapters = [draw(200, below=6, seed=seed) for seed in range(3)]
    for context in ([0, 1, 2], [6, 6, 6], [5, 6, 1]):  # token 6 never occurs
        ends = [torch.tensor([*context, t]) for t in range(7)]
        last = torch.stack([one[-1] for one in kneser_ney(chapters, ends, 7, order=4)])
        assert last.neg().exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_any_vocabulary_of_any_order():
    """Of a published tokenizer's size, where V^order is far beyond 64 bits: the last tokens are counted as the first are."""
    chapters, test = [draw(300, below=5, seed=seed) for seed in range(2)], [draw(40, below=5, seed=9)]
    (first,) = kneser_ney(chapters, test, 73_448, order=6)
    (last,) = kneser_ney([73_443 + one for one in chapters], [73_443 + one for one in test], 73_448, order=6)
    torch.testing.assert_close(last, first, rtol=1e-12, atol=0)
    wanted = by_the_formula([one.tolist() for one in chapters], [test[0].tolist()], 73_448, 6)
    torch.testing.assert_close(first, torch.tensor(wanted[0], dtype=torch.float64), rtol=1e-12, atol=0)


def test_contexts_end_where_a_chapter_begins():
    """Chapter after chapter begins with 1 after one that ended with 0; within chapters 2 follows 0."""
    chapters = [torch.tensor([1, 0, 2, 3 + i % 4, 0]) for i in range(8)] + [torch.tensor([7, 6])]
    (losses,) = kneser_ney(chapters, [torch.tensor([0, 1])], 8, order=2)
    (within,) = kneser_ney(chapters, [torch.tensor([0, 2])], 8, order=2)
    assert within.item() < 0.2 and losses.item() > 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": 0}, "order is at least 1"),
        ({"vocab_size": 4}, "holds tokens from 0 to 4"),
        ({"test": [torch.tensor([1])]}, "at least 2 tokens"),
        ({"train": []}, "at least 2 tokens"),
    ],
)
def test_counting_refuses(change, message):
    given = {"train": [draw(60)], "test": [draw(9)], "vocab_size": 5, "order": 2} | change
    with pytest.raises(ValueError, match=message):
        kneser_ney(**given)


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
    logits, routing = model.forward_with_routing(tokens[:, :-1])
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


def test_a_training_comes_again_bit_for_bit(run, trained):
    before = torch.get_rng_state()
    again = train(run)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, again["state"][name]) for name, value in trained["state"].items())
    assert all(map(torch.equal, trained["losses"], again["losses"])) and trained["routing"] == again["routing"]
    clocks = [
        [{**record, "seconds": 0, "train_loss": str(record["train_loss"])} for record in one["history"]]
        for one in (trained, again)
    ]
    assert clocks[0] == clocks[1]
    other = train(replace(run, seed=4, steps=2))
    assert not torch.equal(other["state"]["lm_head.weight"], trained["state"]["lm_head.weight"])


def test_what_training_says_of_the_model_is_so(run, trained):
    corpus = read_corpus(run.text, V)
    assert [record["step"] for record in trained["history"]] == [0, 20, 40]
    first, last = trained["history"][0], trained["history"][-1]
    assert first["validation_loss"] == pytest.approx(math.log(V), rel=0.05)
    assert first["token_sparsity"] == pytest.approx(0.5, abs=0.1)
    assert last["validation_loss"] < 0.8 * first["validation_loss"]
    model = BlockFFNModel(CONFIG).eval()
    model.load_state_dict(trained["state"])
    for found, wanted in zip(chapter_losses(model, corpus.tokens.test[:3], 64), trained["losses"], strict=True):
        assert torch.equal(found, wanted)
    loss, scores = read_windows(model, *windows(corpus.tokens.test[:3], 64))
    assert trained["routing"] == {"loss": loss, **routing_measures(scores)}
    inputs, targets = windows(corpus.tokens.validation, 64)
    chosen = torch.linspace(0, len(inputs) - 1, 5).long()
    assert last["validation_loss"] == read_windows(model, inputs[chosen], targets[chosen])[0]


def test_a_dense_model_trains_alike_without_routing(run):
    found = train(replace(run, model=dense_twin(CONFIG, 2.0), steps=2))
    assert set(found["routing"]) == {"loss"} and "token_sparsity" not in found["history"][-1]


def test_training_reads_no_held_out_chapter(run, trained, monkeypatch):
    corpus = read_corpus(run.text, V)
    tokens = corpus.tokens._replace(
        test=tuple(one.flip(0) for one in corpus.tokens.test), validation=tuple(one.flip(0) for one in corpus.tokens.validation)
    )
    monkeypatch.setattr(experiment, "read_corpus", lambda *_: corpus._replace(tokens=tokens))
    found = train(run)
    assert all(torch.equal(value, found["state"][name]) for name, value in trained["state"].items())
    assert found["history"][-1]["validation_loss"] != trained["history"][-1]["validation_loss"]
    assert not torch.equal(found["losses"][0], trained["losses"][0])
