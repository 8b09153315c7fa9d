"""Tasks whose strings are drawn and solved by a rule: permutation groups, recall, copying, ListOps.

Any number of strings can be drawn, so each belongs to one part for ever, told by a hash of its tokens: half of all
strings are for training, a quarter for validation, a quarter for the test, whatever the seeds are. Seeds decide only
which of its strings a part shows.
"""

import zlib

import torch
from torch import Generator, Tensor
from torch.nn.functional import one_hot

from nsm_support.checks import check_sizes
from nsm_support.tasks.listops import WORDS, sample_expressions
from nsm_support.tasks.protocol import HELD_OUT, IGNORE, Batch, Control, Task, control

OPTIMUM = Control("optimum: the rule itself", 1.0, 0.0)  #: the targets follow from the inputs
SIZES = {"validation": 500, "test": 1_000}  #: held-out examples, unless `size` says otherwise
PREFIX = 10  #: tokens of a group's word that decide its part
PERMUTATIONS = {
    "parity": ((0, 1), (1, 0)),  # stay, flip
    "s3": ((1, 0, 2), (1, 2, 0)),  # a swap, a 3-cycle
    "a5": ((1, 2, 0, 3, 4), (1, 2, 3, 4, 0)),  # a 3-cycle, a 5-cycle: uniform after 40, as two swaps and a 3-cycle are not
    "s5": ((1, 0, 2, 3, 4), (1, 2, 3, 4, 0)),  # a swap, a 5-cycle
}  #: two generators of each group as i ↦ p[i]; the token 0 is the first of them, the token 1 the second


def part_of(strings: Tensor) -> Tensor:
    """0 or 1 (training), 2 (validation) or 3 (test) for each row of tokens [N, T]: the top bits of a random sum."""
    factors = torch.randint(-(2**62), 2**62, strings.shape[1:], generator=torch.Generator().manual_seed(0))
    return ((strings + 1) * (2 * factors + 1)).sum(1) >> 62 & 3  # sums are modulo 2⁶⁴ (Dietzfelbinger et al. 1997)


class Generated(Task):
    """What the generated tasks share; each says how to draw examples and which lengths it has."""

    def __init__(self, seed: int):
        self.seed = seed
        self._kept: dict[tuple[str, int], Batch] = {}  # the longest that was asked for

    def _draw(self, generator: Generator, n: int, length: int) -> Batch:
        raise NotImplementedError

    def _key(self, inputs: Tensor) -> Tensor:
        """What of the inputs decides their part, [N, any]."""
        return inputs

    def _check(self, length: int, part: str) -> None:
        """Raises ValueError if the task has no strings of this length in this part; by default it has all."""

    def sample_batch(self, generator, batch_size, length=None):
        length = self.max_length if length is None else length
        return self._collect(generator, batch_size, length, "train", max(32, 2 * batch_size))

    def held_out(self, part, length=None, size=None):
        self._has(part)
        length, size = self.max_length if length is None else length, SIZES[part] if size is None else size
        if size < 1 or (part, length) not in self._kept or len(self._kept[part, length].targets) < size:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.name} {part} {length} {self.seed}".encode()))
            self._kept[part, length] = self._collect(generator, size, length, part, 512)
        return Batch(*(tensor[:size] for tensor in self._kept[part, length]))

    def _collect(self, generator: Generator, n: int, length: int, part: str, block: int) -> Batch:
        """The first n examples of a part among blocks of fresh ones: fewer are the beginning of more."""
        self._check(length, part)
        check_sizes(self.name, examples=n)
        kept, count, blocks = [], 0, 0
        while count < n:
            batch = self._draw(generator, block, length)
            place = part_of(self._key(batch.inputs))
            mine = place < 2 if part == "train" else place == 2 + HELD_OUT.index(part)
            kept.append(Batch(batch.inputs[mine], batch.targets[mine]))
            count, blocks = count + int(mine.sum()), blocks + 1
            if blocks == 64 and not count:
                raise ValueError(f"{self.name}: of the few strings that its sizes allow none is for {part}; give larger sizes")
        return Batch(*(torch.cat(tensors)[:n] for tensors in zip(*kept, strict=True)))


class WordProblem(Generated):
    """Follow a permutation group (Barrington 1989; Liu et al. 2023): the product of the generators read so far.

    A token is one of two generators; the target at t is the number of the element "first x₁, then x₂, … then x_t",
    the identity is 0. In the group of parity the token 1 flips.

    Training asks at every position, in words of one random length from 1 to `max_length` a batch. Held-out parts ask
    at the last position alone, at any length from `PREFIX`, which is also the number of tokens that decide a word's
    part: no held-out word begins as a word of training does. Shorter words are too few to be kept apart.
    """

    head, causal, vocab_size = "labelling", True, 2

    def __init__(self, name: str, *, seed: int = 0, max_length: int = 40):
        super().__init__(seed)
        check_sizes(name, max_length=max_length)
        self.name, self.max_length, self.generators = name, max_length, PERMUTATIONS[name]
        self.elements, steps = [tuple(range(len(self.generators[0])))], []  #: permutations i ↦ p[i], the identity first
        for element in self.elements:  # grows under the loop until the group is closed
            products = [tuple(generator[i] for i in element) for generator in self.generators]
            self.elements += [product for product in products if product not in self.elements]
            steps.append([self.elements.index(product) for product in products])
        self.steps = torch.tensor(steps)  #: [elements, 2]: which element follows when a token is read
        self.output_dim = len(steps)

    def sample_batch(self, generator, batch_size, length=None):
        drawn = int(torch.randint(1, self.max_length + 1, (), generator=generator))
        return super().sample_batch(generator, batch_size, drawn if length is None else length)

    def held_out(self, part, length=None, size=None):
        batch = super().held_out(part, length, size)
        last = torch.full_like(batch.targets, IGNORE)
        last[:, -1] = batch.targets[:, -1]
        return Batch(batch.inputs, last)

    def _check(self, length, part):
        least = 1 if part == "train" else PREFIX
        if length < least:
            reason = f"training holds every word of fewer than {PREFIX} tokens"
            raise ValueError(f"{self.name}: length = {length} in {part}; {least} or more is accepted ({reason})")

    def _draw(self, generator, n, length):
        words = torch.randint(2, (n, max(length, PREFIX)), generator=generator)
        state, states = torch.zeros(n, dtype=torch.int64), []
        for token in words.T:
            state = self.steps[state, token]
            states.append(state)
        return Batch(words, torch.stack(states, 1))

    def _key(self, inputs):
        return inputs[:, :PREFIX]

    def _collect(self, generator, n, length, part, block):
        batch = super()._collect(generator, n, length, part, block)
        return Batch(batch.inputs[:, :length], batch.targets[:, :length])

    def _walks(self, length: int) -> Tensor:
        """The chance that a random word of a length has c tokens 1 and ends at element e, [length + 1, elements]."""
        walks = torch.zeros(length + 1, self.output_dim, dtype=torch.float64)
        walks[0, 0] = 1
        for _ in range(length):
            stay, move = (torch.zeros_like(walks).index_add_(1, column, walks / 2) for column in self.steps.T)
            walks = stay + move.roll(1, 0)  # the row that comes round is still empty
        return walks

    def _counters(self, test):
        words, targets = test.inputs, test.targets[:, -1]
        before = self._walks(words.shape[1] - 1).sum(0)  # (elements,): where a word is before its last token
        after = torch.stack([torch.zeros_like(before).index_add_(0, column, before) for column in self.steps.T])
        counted = self._walks(words.shape[1])[words.sum(1)]  # (N, elements)
        return [
            control("counter: the last token, exact over all words", after[words[:, -1]], targets),
            control("counter: how many of each token, exact over all words", counted, targets),
            OPTIMUM,
        ]


class Recall(Generated):
    """Multi-query associative recall (Arora et al. 2023): key, value, key, value, …, then every key again, shuffled.

    Keys are the tokens 0 to keys − 1 and differ within a sequence; values are the tokens that follow, drawn with
    repetition; asked at each of the last `pairs` positions is the value's number, 0 to values − 1. Unlike the original,
    every key is asked for exactly once, and nothing stands between the queries. Length 3n has n pairs. No pairs (in
    their order) that a held-out part shows occur in training.
    """

    head, causal, name = "labelling", True, "recall"

    def __init__(self, *, seed: int = 0, pairs: int = 8, keys: int = 32, values: int = 32):
        super().__init__(seed)
        check_sizes(self.name, pairs=pairs, keys=keys, values=values)
        self.keys, self.output_dim, self.vocab_size, self.max_length = keys, values, keys + values, 3 * pairs
        self._check(self.max_length, "train")

    def _check(self, length, part):
        if length < 3 or length % 3 or length > 3 * self.keys:
            raise ValueError(
                f"recall: length = {length} of {self.keys} keys; 3 · pairs, with 1 to {self.keys} pairs, is accepted"
            )

    def _draw(self, generator, n, length):
        pairs = length // 3
        keys = torch.rand(n, self.keys, generator=generator).argsort(1)[:, :pairs]
        values = torch.randint(self.output_dim, (n, pairs), generator=generator)
        order = torch.rand(n, pairs, generator=generator).argsort(1)
        shown = torch.stack([keys, self.keys + values], 2).flatten(1)  # (n, 2 · pairs)
        unasked = torch.full_like(shown, IGNORE)
        return Batch(torch.cat([shown, keys.gather(1, order)], 1), torch.cat([unasked, values.gather(1, order)], 1))

    def _key(self, inputs):
        return inputs[:, : inputs.shape[1] // 3 * 2]  # the pairs, in whatever order they are asked for

    def _counters(self, test):
        values = self._key(test.inputs)[:, 1::2] - self.keys  # (N, pairs)
        return [_shown("values", values, test.targets, self.output_dim), OPTIMUM]


class SelectiveCopying(Generated):
    """Selective copying (Gu and Dao 2023): `data` tokens lie scattered in noise; the end asks for them in order.

    Data are the tokens 0 to tokens − 1, noise is `tokens`, and each of the last `data` positions holds the question,
    `tokens + 1`. The positions before are data and noise: `context` of them by default, length − data at a length.
    """

    head, causal, name = "labelling", True, "selective_copying"

    def __init__(self, *, seed: int = 0, data: int = 8, tokens: int = 8, context: int = 64):
        super().__init__(seed)
        check_sizes(self.name, data=data, tokens=tokens, context=context)
        self.data, self.output_dim, self.vocab_size, self.max_length = data, tokens, tokens + 2, context + data
        self._check(self.max_length, "train")

    def _check(self, length, part):
        if length < 2 * self.data:
            reason = f"{self.data} data tokens and as many questions"
            raise ValueError(f"selective_copying: length = {length}; {2 * self.data} or more is accepted, room for {reason}")

    def _draw(self, generator, n, length):
        context = length - self.data
        places = torch.rand(n, context, generator=generator).argsort(1)[:, : self.data].sort(1).values
        data = torch.randint(self.output_dim, (n, self.data), generator=generator)
        inputs = torch.full((n, length), self.output_dim).scatter_(1, places, data)
        inputs[:, context:] = self.output_dim + 1
        return Batch(inputs, torch.cat([torch.full((n, context), IGNORE), data], 1))

    def _counters(self, test):
        data = test.targets[:, -self.data :]  # the tokens that the context shows
        return [_shown("data tokens", data, test.targets, self.output_dim), OPTIMUM]


def _shown(what: str, shown: Tensor, targets: Tensor, classes: int) -> Control:
    """The control that knows which answers [N, n] each sequence shows, and how often, but not which belongs where."""
    share = one_hot(shown, classes).double().mean(1, keepdim=True)  # (N, 1, C)
    return control(f"counter: the commonest of the {what} shown", share.expand(*targets.shape, -1), targets)


class ListOps(Generated):
    """Evaluate a nested list operation (`listops`); the class is its value, 0 to 9.

    Every expression is padded at the right with the token 0 to `max_length`.
    """

    name, head, causal, vocab_size, output_dim = "listops", "classification", False, len(WORDS), 10

    def __init__(self, *, seed: int = 0, max_depth: int = 5, max_args: int = 10, min_length: int = 16, max_length: int = 128):
        super().__init__(seed)
        self.max_length = max_length
        self.limits = {"max_depth": max_depth, "max_args": max_args, "min_length": min_length, "max_length": max_length}
        sample_expressions(torch.Generator().manual_seed(0), 1, **self.limits)  # an error comes now, not in training

    def sample_batch(self, generator, batch_size, length=None):
        self._has("test", length)
        return super().sample_batch(generator, batch_size)

    def held_out(self, part, length=None, size=None):
        self._has(part, length)
        return super().held_out(part, size=size)

    def _draw(self, generator, n, length):
        return Batch(*sample_expressions(generator, n, **self.limits))

    def _counters(self, test):
        fitted = self.sample_batch(torch.Generator().manual_seed(self.seed), 2_048)
        table = torch.ones(self.vocab_size, self.output_dim)  # one count more for each, so that no loss is infinite
        table.index_put_((fitted.inputs[:, 0], fitted.targets), torch.ones(()), accumulate=True)
        table /= table.sum(1, keepdim=True)
        return [control("counter: the first operator", table[test.inputs[:, 0]], test.targets), OPTIMUM]
