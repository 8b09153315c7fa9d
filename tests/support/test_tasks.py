"""Every task against a solver written another way; parts that share nothing; controls against counting by hand."""

import itertools
import math
import statistics
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from nsm_support.data import load_digits, load_text, split_text
from nsm_support.tasks import IGNORE, PREFIX, SECTIONS, TASKS, Score, Task, make_task, score
from nsm_support.tasks.listops import WORDS
from tests.support.draws import generator

GROUPS = {"parity": 2, "s3": 6, "a5": 60, "s5": 120}
GENERATED = (*GROUPS, "recall", "selective_copying", "listops")
REAL = ("mnist", "permuted_mnist", "verse_section", "text")
FIRST = "In the beginning God created the heavens and the earth."


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return {name: make_task(name) for name in TASKS}


def control(task: Task, start: str, length: int | None = None):
    (found,) = [control for control in task.controls_at(length) if control.name.startswith(start)]
    return found


@pytest.mark.parametrize("name", TASKS)
def test_every_task_keeps_the_protocol(tasks, name):
    task = tasks[name]
    assert task.name == name and (task.vocab_size is None) != (task.input_dim is None)
    batch, other = task.sample_batch(generator(), 6), task.sample_batch(generator(1), 6)
    for inputs, targets in (batch, task.held_out("validation", size=5), task.held_out("test", size=5)):
        assert targets.dtype == torch.int64 and len(inputs) == len(targets)
        assert inputs.shape[1] <= task.max_length
        asked = targets[targets != IGNORE]
        assert len(asked) and asked.min() >= 0 and asked.max() < task.output_dim
        if task.vocab_size is None:
            assert inputs.dtype == torch.float32 and inputs.shape[2:] == (task.input_dim,)
        else:
            assert inputs.dtype == torch.int64 and inputs.min() >= 0 and inputs.max() < task.vocab_size
        assert targets.shape == (inputs.shape[:1] if task.head == "classification" else inputs.shape)
        assert task.causal == (task.head != "classification")
    again = task.sample_batch(generator(), 6)
    assert all(torch.equal(*pair) for pair in zip(batch, again, strict=True))
    assert batch.inputs.shape != other.inputs.shape or not torch.equal(batch.inputs, other.inputs)
    assert len(task.sample_batch(generator(), 1).targets) == 1


@pytest.mark.parametrize("name", TASKS)
def test_held_out_parts_are_fixed_and_shorter_ones_begin_longer_ones(tasks, name):
    task = tasks[name]
    rebuilt, elsewhere = make_task(name), make_task(name, seed=1)
    state = torch.get_rng_state()
    parts = {part: task.held_out(part, size=40) for part in ("validation", "test")}
    assert torch.equal(state, torch.get_rng_state())  # nothing is seeded or drawn globally
    for part, batch in parts.items():
        for same in (rebuilt.held_out(part, size=40), rebuilt.held_out(part, size=60)):
            assert torch.equal(same.inputs[:40], batch.inputs) and torch.equal(same.targets[:40], batch.targets)
        assert not torch.equal(elsewhere.held_out(part, size=40).inputs, batch.inputs)
    assert not torch.equal(parts["validation"].inputs, parts["test"].inputs)


def test_score_is_the_cross_entropy_of_what_is_asked():
    outputs, targets = torch.randn(4, 7, 5, generator=generator()), torch.randint(5, (4, 7), generator=generator())
    targets[torch.rand(4, 7, generator=generator()) < 0.4] = IGNORE
    scored = score(outputs, targets)
    right = count = 0
    for row, wanted in zip(outputs.flatten(0, 1).tolist(), targets.flatten().tolist(), strict=True):
        if wanted != IGNORE:
            right, count = right + (row.index(max(row)) == wanted), count + 1
    assert (scored.correct, scored.asked) == (right, count)
    loss = cross_entropy(outputs.double().flatten(0, 1), targets.flatten(), ignore_index=IGNORE).item()
    assert scored.loss_nats == pytest.approx(loss) and scored.accuracy == right / count
    assert scored.bits == pytest.approx(loss / math.log(2))
    halves = [score(outputs[i : i + 2], targets[i : i + 2]) for i in (0, 2)]
    assert Score(*map(sum, zip(*halves, strict=True))) == pytest.approx(scored)
    assert score(torch.zeros(3, 8), torch.arange(3)).bits == pytest.approx(3)  # uniform over 8
    with pytest.raises(ValueError, match=r"outputs \(4, 7, 5\) for targets \(4,\)"):
        score(outputs, targets[:, 0])
    with pytest.raises(ValueError, match="every target is IGNORE"):
        score(outputs, torch.full((4, 7), IGNORE))
    with pytest.raises(ValueError, match="targets from 5 to 5; 0 to 4 and IGNORE"):
        score(outputs, torch.full((4, 7), 5))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("a_5", {}, "'a_5' is no task; accepted are mnist, .*, text; did you mean 'a5'"),
        ("recall", {"pair": 3}, "recall has no pair; accepted are pairs, keys, values"),
        ("recall", {"fold": 1}, "recall has no fold 1; only mnist and permuted_mnist have folds"),
        ("mnist", {"fold": 5}, "fold 5 of 5"),
        ("mnist", {"per_class": 501}, "per_class = 501; 1 to 500"),
        ("a5", {"max_length": 0}, "a5: max_length = 0; accepted is a whole number"),
        ("recall", {"pairs": 9, "keys": 8}, r"length = 27 of 8 keys; 3 · pairs, with 1 to 8 pairs"),
        ("selective_copying", {"data": 8, "context": 7}, "length = 15; 16 or more"),
        ("listops", {"min_length": 9, "max_length": 8}, "lengths 9 to 8; "),
        ("listops", {"max_depth": 1, "max_args": 2, "min_length": 5}, "no expression of 5 to 128 tokens in 10,000 draws"),
        ("verse_section", {"length": 1}, "length = 1; every held-out verse begins as one of training"),
        ("text", {"length": 10**6}, "length = 1000000; the validation part has .* characters: up to"),
    ],
)
def test_what_does_not_exist_is_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_task(name, **arguments)


@pytest.mark.parametrize("name", ["a5", "recall", "listops", "text", "mnist"])
def test_wrong_parts_lengths_and_sizes_are_refused(tasks, name):
    task = tasks[name]
    with pytest.raises(ValueError, match="part 'train'; 'validation' and 'test' are accepted"):
        task.held_out("train")
    for size in (0, -1):
        with pytest.raises(ValueError, match=r"at least 1|1 to \d+ is accepted"):
            task.held_out("test", size=size)
    if name in (*REAL, "listops"):
        for call in (lambda: task.sample_batch(generator(), 2, 12), lambda: task.held_out("test", 12)):
            with pytest.raises(ValueError, match="length = 12; None is accepted"):
                call()
    if name in REAL:
        with pytest.raises(ValueError, match=r"size = 1000000; 1 to \d+ is accepted, or None"):
            task.held_out("test", size=10**6)


def matrix(permutation) -> np.ndarray:
    """P with P e_i = e_p[i]."""
    square = np.zeros((len(permutation),) * 2, dtype=int)
    square[list(permutation), range(len(permutation))] = 1
    return square


def products(task, words: torch.Tensor) -> list[list[int]]:
    """Every prefix's element, by multiplying matrices."""
    matrices = [matrix(permutation) for permutation in task.generators]
    numbers = {matrix(element).tobytes(): number for number, element in enumerate(task.elements)}
    found = []
    for word in words.tolist():
        product, row = np.eye(len(task.elements[0]), dtype=int), []
        for token in word:
            product = matrices[token] @ product
            row.append(numbers[product.tobytes()])
        found.append(row)
    return found


@pytest.mark.parametrize(("name", "order"), GROUPS.items())
def test_two_permutations_generate_the_group(tasks, name, order):
    task = tasks[name]
    assert task.output_dim == order == len(set(task.elements))
    assert task.elements[0] == tuple(range(len(task.elements[0])))
    points = {"parity": 2, "s3": 3, "a5": 5, "s5": 5}[name]
    everything = set(itertools.permutations(range(points)))
    even = {p for p in everything if round(np.linalg.det(matrix(p))) == 1}
    assert set(task.elements) == (even if name == "a5" else everything)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("length", [1, 9, 10, 63])
def test_targets_are_products_of_matrices(tasks, name, length):
    task = tasks[name]
    inputs, targets = task.sample_batch(generator(length), 20, length)
    assert inputs.shape == targets.shape == (20, length)
    assert targets.tolist() == products(task, inputs)
    if name == "parity":
        assert targets.tolist() == [[sum(word[: t + 1]) % 2 for t in range(length)] for word in inputs.tolist()]
    if length >= PREFIX:
        inputs, targets = task.held_out("test", length, 20)
        assert inputs.shape == targets.shape == (20, length)
        assert targets[:, -1].tolist() == [row[-1] for row in products(task, inputs)]
        assert (targets[:, :-1] == IGNORE).all()
    else:
        with pytest.raises(ValueError, match=f"length = {length} in test; {PREFIX} or more"):
            task.held_out("test", length)


def test_no_held_out_word_begins_as_a_training_word_does(tasks):
    task, draws = tasks["s5"], generator()
    begun = {tuple(word) for _ in range(60) for word in task.sample_batch(draws, 200, 12).inputs[:, :PREFIX].tolist()}
    held = [
        {tuple(word) for word in task.held_out(part, length, 3000).inputs[:, :PREFIX].tolist()}
        for part in ("validation", "test")
        for length in (10, 12)
    ]
    validation, test = held[0] | held[1], held[2] | held[3]
    assert not (begun & validation or begun & test or validation & test)
    assert len(begun | validation | test) == 2**PREFIX  # every beginning belongs to a part
    assert 0.4 < len(begun) / 2**PREFIX < 0.6


@pytest.mark.parametrize("name", GROUPS)
def test_group_counters_are_exact_over_all_words(tasks, name):
    task, length = tasks[name], 11
    last, counted = defaultdict(Counter), defaultdict(Counter)
    words = torch.tensor(list(itertools.product((0, 1), repeat=length)))
    for word, row in zip(words.tolist(), products(task, words), strict=True):
        last[word[-1]][row[-1]] += 1
        counted[sum(word)][row[-1]] += 1
    test = task.held_out("test", length)
    answers = test.targets[:, -1].tolist()
    for start, table, keys in (
        ("counter: the last token", last, test.inputs[:, -1].tolist()),
        ("counter: how many of each token", counted, test.inputs.sum(1).tolist()),
    ):
        losses = [-math.log(table[key][answer] / table[key].total()) for key, answer in zip(keys, answers, strict=True)]
        found = control(task, start, length)
        assert found.loss_nats == pytest.approx(statistics.fmean(losses), abs=1e-9)
        best = {key: {e for e, n in counts.items() if n == max(counts.values())} for key, counts in table.items()}
        sure = [answer in best[key] and len(best[key]) == 1 for key, answer in zip(keys, answers, strict=True)]
        ties = [answer in best[key] for key, answer in zip(keys, answers, strict=True)]
        assert statistics.fmean(sure) <= found.accuracy <= statistics.fmean(ties)
    assert control(task, "optimum")[1:] == (1, 0)


def recalled(inputs: list[int], keys: int) -> list[int]:
    """The targets of a recall sequence, with a dict."""
    pairs = len(inputs) // 3
    table = dict(zip(inputs[: 2 * pairs : 2], inputs[1 : 2 * pairs : 2], strict=True))
    assert len(table) == pairs and set(table) == set(inputs[2 * pairs :])  # distinct keys, each asked for once
    return [IGNORE] * 2 * pairs + [table[key] - keys for key in inputs[2 * pairs :]]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(0, 5), st.integers(1, 9), st.integers(0, 99))
def test_recall_is_a_dict(pairs, more, values, seed):
    task = make_task("recall", pairs=pairs, keys=pairs + more, values=values + 1)
    batch = task.sample_batch(generator(seed), 9)
    assert batch.inputs.shape == (9, 3 * pairs) and task.vocab_size == pairs + more + values + 1
    assert batch.targets.tolist() == [recalled(row, task.keys) for row in batch.inputs.tolist()]


def test_recall_at_other_lengths_and_its_balance(tasks):
    task = tasks["recall"]
    for length in (3, 27, 96):
        inputs, targets = task.held_out("test", length, 9)
        assert inputs.shape == (9, length) and targets.tolist() == [recalled(row, task.keys) for row in inputs.tolist()]
    for length in (0, 1, 25, 99):
        with pytest.raises(ValueError, match=f"length = {length} of 32 keys; 3 · pairs, with 1 to 32 pairs"):
            task.sample_batch(generator(), 2, length)
    inputs, targets = task.held_out("test", size=4000)
    for numbers in (targets[:, -8:], inputs[:, :16:2], inputs[:, -8:], inputs[:, 16], inputs[:, -1]):
        counts = numbers.flatten().bincount(minlength=32)
        assert (counts - numbers.numel() / 32).abs().max() < 5 * math.sqrt(numbers.numel() / 32)
    first_asked = (inputs[:, :16:2] == inputs[:, 16:17]).double().mean(0)
    assert (first_asked - 1 / 8).abs().max() < 5 * math.sqrt(1 / 8 / 4000)  # the order of the questions says nothing


def test_recall_prompts_of_a_small_space_are_shared_by_no_two_parts():
    task, draws = make_task("recall", pairs=2, keys=3, values=3), generator()
    prompts = [{tuple(row) for _ in range(20) for row in task.sample_batch(draws, 50).inputs[:, :4].tolist()}]
    prompts += [{tuple(row) for row in task.held_out(part).inputs[:, :4].tolist()} for part in ("validation", "test")]
    assert len(set.union(*prompts)) == sum(map(len, prompts)) == 3 * 2 * 3 * 3  # all prompts, each in one part
    with pytest.raises(ValueError, match="of the few strings that its sizes allow none is for"):
        for part in ("validation", "test"):
            make_task("recall", pairs=1, keys=1, values=1).held_out(part)


def test_recall_and_copying_controls_by_counting(tasks):
    for name, shown in (
        ("recall", lambda row: [token - 32 for token in row[1:16:2]]),
        ("selective_copying", lambda row: [token for token in row if token < 8]),
    ):
        right, losses, everything = [], [], []
        test = tasks[name].held_out("test")
        for row, targets in zip(test.inputs.tolist(), test.targets.tolist(), strict=True):
            answers, counts = targets[-8:], Counter(shown(row))
            best = min(counts, key=lambda value: (-counts[value], value))
            right += [answer == best for answer in answers]
            losses += [-math.log(counts[answer] / 8) for answer in answers]
            everything += answers
        assert tasks[name].controls[1] == control(tasks[name], "counter: the commonest of the")
        assert tasks[name].controls[1][1:] == pytest.approx((statistics.fmean(right), statistics.fmean(losses)))
        (_, most), *_ = Counter(everything).most_common(1)
        entropy = -sum(n / len(everything) * math.log(n / len(everything)) for n in Counter(everything).values())
        assert tasks[name].controls[0] == ("chance: the commonest class", most / len(everything), pytest.approx(entropy))
        assert control(tasks[name], "optimum")[1:] == (1, 0)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(2, 6), st.integers(0, 20), st.integers(0, 99))
def test_copying_is_a_list_comprehension(data, tokens, more, seed):
    task = make_task("selective_copying", data=data, tokens=tokens, context=data + more + 3)
    for length in (None, 2 * data + 4, 3 * data + more + 9):
        batch = task.sample_batch(generator(seed), 9, length)
        for row, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            wanted = [token for token in row if token < tokens]
            assert len(row) == (length or task.max_length) and row[-data:] == [tokens + 1] * data
            assert set(row[:-data]) <= set(range(tokens + 1))
            assert targets == [IGNORE] * (len(row) - data) + wanted


def test_copying_places_are_uniform_and_strings_apart():
    task = make_task("selective_copying", data=1, tokens=2, context=20)
    inputs = task.held_out("test", 2001, 500).inputs
    places = (inputs < 2).double().argmax(1)
    assert abs(places.double().mean().item() - 999.5) < 5 * 577 / math.sqrt(500)
    assert make_task("selective_copying", data=3, context=3).sample_batch(generator(), 4).inputs.shape == (4, 6)
    draws = generator()
    strings = [{tuple(row) for _ in range(20) for row in task.sample_batch(draws, 50).inputs.tolist()}]
    strings += [{tuple(row) for row in task.held_out(part).inputs.tolist()} for part in ("validation", "test")]
    assert len(set.union(*strings)) == sum(map(len, strings)) == 40
    with pytest.raises(ValueError, match="length = 1; 2 or more is accepted, room for 1 data tokens"):
        task.sample_batch(generator(), 2, 1)


def solved(words: list[str]) -> tuple[int, int, int]:
    """The value of an expression, its depth, and its most arguments: a stack over the words."""
    stack, depth, most = [[]], 0, 0
    for word in words:
        if word.startswith("["):
            stack.append([word])
            depth = max(depth, len(stack) - 1)
        elif word == "]":
            operator, *arguments = stack.pop()
            assert len(arguments) >= 2
            most = max(most, len(arguments))
            value = {
                "[MIN": np.min(arguments),
                "[MAX": np.max(arguments),
                "[MED": np.floor(np.median(arguments)),
                "[SM": np.sum(arguments) % 10,
            }[operator]
            stack[-1].append(int(value))
        else:
            stack[-1].append(int(word))
    ((value,),) = stack
    return value, depth, most


def expressions(inputs: torch.Tensor) -> list[list[str]]:
    """Words without the padding, which has to be at the right."""
    rows = [[WORDS[token] for token in row] for row in inputs.tolist()]
    texts = [[word for word in row if word != "PAD"] for row in rows]
    assert all(row[: len(text)] == text for row, text in zip(rows, texts, strict=True))
    return texts


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"max_depth": 1, "max_args": 2, "min_length": 4, "max_length": 5},
        {"max_depth": 3, "max_args": 4, "min_length": 1, "max_length": 33},
        {"max_depth": 10, "max_args": 10, "min_length": 500, "max_length": 2000},
    ],
)
def test_listops_is_what_a_stack_says(sizes):
    task = make_task("listops", **sizes)
    batch = task.sample_batch(generator(), 20 if task.max_length > 1000 else 400)
    assert batch.inputs.shape[1] == task.max_length
    depths, widths = Counter(), Counter()
    for text, target in zip(expressions(batch.inputs), batch.targets.tolist(), strict=True):
        value, depth, most = solved(text)
        assert value == target and task.limits["min_length"] <= len(text) <= task.max_length
        depths[depth] += 1
        widths[most] += 1
    assert max(depths) <= task.limits["max_depth"] and max(widths) <= task.limits["max_args"]
    if not sizes:
        assert max(depths) == 5 and max(widths) == 10


@pytest.mark.slow
def test_listops_distribution_control_and_parts(tasks):
    task, draws = tasks["listops"], generator()
    test = task.held_out("test")
    shares = test.targets.bincount(minlength=10).double() / 1000
    assert shares.min() > 0.05 and shares.max() < 0.25  # the ends are commoner, as in Long Range Arena
    assert task.controls[0][:2] == ("chance: the commonest class", pytest.approx(shares.max().item()))
    fitted = task.sample_batch(generator(), 2048)
    table = defaultdict(lambda: [1] * 10)
    for text, target in zip(expressions(fitted.inputs), fitted.targets.tolist(), strict=True):
        table[text[0]][target] += 1
    firsts = [text[0] for text in expressions(test.inputs)]
    answers = test.targets.tolist()
    right = [table[first].index(max(table[first])) == answer for first, answer in zip(firsts, answers, strict=True)]
    losses = [-math.log(table[first][answer] / sum(table[first])) for first, answer in zip(firsts, answers, strict=True)]
    found = control(task, "counter: the first operator")
    assert found[1:] == pytest.approx((statistics.fmean(right), statistics.fmean(losses)))
    small = make_task("listops", max_depth=1, max_args=2, min_length=4, max_length=4)  # 400 strings in all
    strings = [{tuple(row) for _ in range(40) for row in small.sample_batch(draws, 100).inputs.tolist()}]
    strings += [{tuple(row) for row in small.held_out(part, size=2000).inputs.tolist()} for part in ("validation", "test")]
    assert len(set.union(*strings)) == sum(map(len, strings)) == 400


def test_digits_are_read_as_patches_and_as_pixels_in_one_mixed_order():
    small = {name: make_task(name, per_class=10, fold=2) for name in ("mnist", "permuted_mnist")}
    images = {image.flatten().numpy().tobytes(): image for image in load_digits(10).images}
    order = torch.randperm(784, generator=generator())
    patches, pixels = (small[name].parts["train"] for name in small)
    assert torch.equal(patches.targets, pixels.targets)
    for mixed, cut in zip(pixels.inputs[:5], patches.inputs[:5], strict=True):
        image = torch.empty(784)
        image[order] = mixed[:, 0]
        image = images[image.numpy().tobytes()]
        assert torch.equal(cut[8], image[4:8, 4:8].flatten()) and torch.equal(cut[48], image[24:, 24:].flatten())
    restored = torch.empty(784)
    restored[order] = make_task("permuted_mnist", per_class=10, seed=3).parts["train"].inputs[0, :, 0]
    assert restored.numpy().tobytes() in images  # the order is the same at another seed


@pytest.mark.parametrize("name", ["mnist", "permuted_mnist"])
def test_digits_are_held_out_by_fold(name):
    every = set()
    for fold in range(5):
        task = make_task(name, fold=fold, per_class=20)
        rows = {part: {image.numpy().tobytes() for image in task.parts[part].inputs} for part in task.parts}
        assert [len(rows[part]) for part in ("train", "validation", "test")] == [140, 20, 40]
        assert len(set.union(*rows.values())) == 200
        assert len(task.held_out("test").targets) == 40 and task.held_out("test").targets.bincount().tolist() == [4] * 10
        assert not every & rows["test"]
        every |= rows["test"]
        sampled = {image.numpy().tobytes() for image in task.sample_batch(generator(), 140).inputs}
        assert sampled == rows["train"]
    assert len(every) == 200


def test_the_digits_counter_is_the_nearest_mean(tasks):
    task = tasks["mnist"]
    train, test = task.parts["train"], task.parts["test"]
    means = np.stack([train.inputs[train.targets == digit].numpy().reshape(-1, 784).mean(0) for digit in range(10)])
    distances = ((test.inputs.numpy().reshape(-1, 1, 784) - means) ** 2).sum(2)
    right = float((distances.argmin(1) == test.targets.numpy()).mean())
    assert task.controls[1] == ("counter: the nearest mean image", pytest.approx(right), None)
    assert tasks["permuted_mnist"].controls[1].accuracy == pytest.approx(right)  # the order of the pixels is nothing to it
    assert task.controls[0][1:] == (0.1, pytest.approx(math.log(10)))
    assert len(task.controls) == 2  # no optimum is known


@pytest.mark.slow
def test_verses_are_those_of_the_bible_in_held_out_chapters(tasks):
    task = tasks["verse_section"]
    assert list(SECTIONS) == ["law", "history", "wisdom", "prophets", "gospels and Acts", "letters and Revelation"]
    sections = {book: sum(book >= start for start in (1, 6, 18, 23, 40, 45)) - 1 for book in range(1, 67)}
    text = load_text()
    train: set[str] = set()
    for part, chapters in split_text(text)._asdict().items():
        inputs, targets = task.parts[part]
        where = defaultdict(list)  # a chapter's text by its section
        for chapter in chapters.chapters:
            where[sections[chapter.book]].append(chapters.content[chapter.start : chapter.end])
        joined = {section: "\n".join(texts) for section, texts in where.items()}
        verses = []
        for row, section in zip(inputs.tolist(), targets.tolist(), strict=True):
            verse = "".join(task.vocabulary.characters[token - 1] for token in row if token)
            assert [token for token in row if token] == row[: len(verse)] and verse  # padded at the right
            assert verse in joined[section]
            verses.append(verse)
        if part == "train":
            train = set(verses)
            assert len(verses) > 24_000 and (FIRST in train) == ("Genesis 1" in {c.name for c in chapters.chapters})
        else:
            assert not train & set(verses) and len(verses) > 3_000
    assert inputs.shape[1] == 128 and max(map(len, verses)) == 128
    everything = sum(len(batch.targets) for batch in task.parts.values())
    assert 0 < 31_102 - 16 - everything < 300  # 16 are empty; the rest read like one of training


def test_the_verse_counter_is_naive_bayes(tasks):
    from sklearn.naive_bayes import MultinomialNB

    task = tasks["verse_section"]
    bags = [
        np.stack([np.bincount(row, minlength=task.vocab_size)[1:] for row in task.parts[part].inputs.numpy()])
        for part in ("train", "test")
    ]
    fitted = MultinomialNB(alpha=1.0).fit(bags[0], task.parts["train"].targets.numpy())
    answers = task.parts["test"].targets.numpy()
    logs = fitted.predict_log_proba(bags[1])
    expected = (logs.argmax(1) == answers).mean(), -logs[np.arange(len(answers)), answers].mean()
    found = control(task, "counter: naive Bayes")
    assert found[1:] == pytest.approx(expected)
    assert task.controls[0].accuracy == pytest.approx(np.bincount(answers).max() / len(answers))
    assert found.accuracy > task.controls[0].accuracy


@pytest.mark.slow
def test_text_windows_are_consecutive_characters_of_their_part():
    for length in (1, 63):
        task = make_task("text", length=length)
        split = split_text(load_text())
        draws = task.sample_batch(generator(), 20)
        for row, following in zip(*draws, strict=True):
            window = task.vocabulary.decode(row) + task.vocabulary.decode(following[-1:])
            assert len(window) == length + 1 and window in split.train.content
            assert torch.equal(row[1:], following[:-1])
        inputs, targets = task.held_out("test")
        assert len(inputs) == (len(split.test.content) - 1) // length
        scored = "".join(map(task.vocabulary.decode, targets))
        assert Counter(scored) - Counter(split.test.content) == Counter()  # no character is predicted twice
        assert sum((Counter(split.test.content) - Counter(scored)).values()) <= length
        for row in inputs[:20]:
            assert task.vocabulary.decode(row) in split.test.content
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
    train, test = ({chapter.name for chapter in part.chapters} for part in (split.train, split.test))
    assert not train & test


def test_text_of_a_file_and_its_counters(tmp_path):
    path = tmp_path / "words.txt"
    words = ["abra", "cadabra", "barb", "card"]
    choice = torch.randint(4, (6000,), generator=generator()).tolist()
    path.write_text("\n\n".join(" ".join(words[i] for i in choice[start : start + 100]) for start in range(0, 6000, 100)))
    task = make_task("text", path=path, length=20)
    assert task.output_dim == task.vocab_size == len(set(path.read_text()))
    split = split_text(load_text(path))
    pairs = Counter(itertools.pairwise(split.train.content))
    firsts, singles = Counter(split.train.content[:-1]), Counter(split.train.content[1:])
    inputs, targets = task.held_out("test")
    losses, right = [], []
    for row, following in zip(map(task.vocabulary.decode, inputs), map(task.vocabulary.decode, targets), strict=True):
        for a, b in zip(row, following, strict=True):
            one = {c: (singles[c] + Fraction(1, task.vocab_size)) / (singles.total() + 1) for c in task.vocabulary.characters}
            two = {c: (pairs[a, c] + one[c]) / (firsts[a] + 1) for c in one}
            losses.append(-math.log(two[b]))
            right.append(max(two, key=two.get) == b)
        if len(losses) > 3000:
            break
    few = -(-len(losses) // 20)
    part = make_task("text", path=path, length=20)
    part.parts["test"] = part.held_out("test", size=few)
    assert control(part, "counter: bigram")[1:] == pytest.approx((statistics.fmean(right), statistics.fmean(losses)))
    chance, bigram, trigram = task.controls
    assert trigram.loss_nats < bigram.loss_nats < chance.loss_nats and bigram.accuracy > chance.accuracy
    counts = Counter(targets.flatten().tolist())
    assert chance.accuracy == pytest.approx(max(counts.values()) / targets.numel())
    with pytest.raises(FileNotFoundError):
        make_task("text", path=tmp_path / "none.txt")


@pytest.mark.parametrize("name", TASKS)
def test_controls_are_ordered_kept_and_sound(tasks, name):
    controls = tasks[name].controls
    assert controls is tasks[name].controls  # computed once
    kinds = [control.name.split(":")[0] for control in controls]
    assert kinds[:2] == ["chance", "counter"] and set(kinds) <= {"chance", "counter", "optimum"}
    assert ("optimum" in kinds) == (name in GENERATED)
    for _, accuracy, loss in controls:
        assert 0 < accuracy <= 1 and (loss is None or 0 <= loss < 10)
