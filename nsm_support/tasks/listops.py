"""ListOps: nested list operations on digits, written out as tokens (Nangia and Bowman 2018).

`[MAX 2 9 [MIN 4 7 ] 0 ]` is 9. The operators are MIN, MAX, MED (the median, rounded down, where the number of arguments is even)
and SM (the sum modulo 10). The rules are those of Long Range Arena (Tay et al. 2020): 2 to `max_args` arguments, each with
probability ¼ an expression of its own above `max_depth` and a digit otherwise, and only lengths from `min_length` to `max_length`
are kept. What differs: Long Range Arena has depth 10, up to 10 arguments, 500 to 2,000 tokens and 96,000 fixed expressions for
training; here the sizes are the caller's, every batch is fresh, and each expression is an operator at its root.
"""

import random
from collections.abc import Callable

import torch
from torch import Generator, Tensor

OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: (sorted(values)[(len(values) - 1) // 2] + sorted(values)[len(values) // 2]) // 2,
    "[SM": lambda values: sum(values) % 10,
}
WORDS = ("PAD", *"0123456789", *OPERATORS, "]")  #: a word's token is its place here; 0 pads at the right
NESTED = 0.25  #: the chance that an argument is an expression and not a digit


def sample_expressions(
    generator: Generator, n: int, *, max_depth: int, max_args: int, min_length: int, max_length: int
) -> tuple[Tensor, Tensor]:
    """Draw n expressions, tokens [n, max_length] padded with 0 at the right, and their values [n], 0 to 9.

    Raises ValueError if sizes contradict each other, or 10,000 draws in a row gave no expression of the lengths wanted.
    """
    sizes = f"max_depth = {max_depth}, max_args = {max_args}, lengths {min_length} to {max_length}"
    if max_depth < 1 or max_args < 2 or not 1 <= min_length <= max_length or max_length < 4:
        accepted = "max_depth from 1, max_args from 2, 1 ≤ min_length ≤ max_length, max_length from 4 (the shortest expression)"
        raise ValueError(f"listops: {sizes}; accepted is {accepted}")
    draw = random.Random(int(torch.randint(2**62, (), generator=generator)))  # ten times faster than tensors of one
    tokens, missed = torch.zeros(n, max_length, dtype=torch.int64), 0
    values: list[int] = []
    while len(values) < n:
        written: list[int] = []
        value = _write(draw, written, 1, max_depth, max_args, max_length)
        if min_length <= len(written) <= max_length:
            tokens[len(values), : len(written)] = torch.tensor(written)
            values.append(value)
            missed = 0
        elif (missed := missed + 1) == 10_000:
            raise ValueError(f"listops: no expression of {min_length} to {max_length} tokens in {missed:,} draws of {sizes}")
    return tokens, torch.tensor(values, dtype=torch.int64)


def _write(draw: random.Random, written: list[int], depth: int, max_depth: int, max_args: int, limit: int) -> int:
    """Append a random expression's tokens to `written` and return its value; beyond the limit it is left unfinished."""
    operator = draw.choice(tuple(OPERATORS))
    written.append(WORDS.index(operator))
    arguments = []
    for _ in range(draw.randint(2, max_args)):
        if len(written) > limit:
            return 0  # too long: the caller throws it away
        if depth < max_depth and draw.random() < NESTED:
            arguments.append(_write(draw, written, depth + 1, max_depth, max_args, limit))
        else:
            arguments.append(draw.randrange(10))
            written.append(1 + arguments[-1])
    written.append(len(WORDS) - 1)
    return OPERATORS[operator](arguments)
