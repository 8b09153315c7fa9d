"""One refusal of bad input for the whole package: `Class: field = value; accepted is …`, always a ValueError.

`owner` is who refuses: an object, which stands for its class, or the name of a function. Fields may be given by name, to be
read from the owner, or with their values.
"""

from collections.abc import Iterable
from numbers import Integral
from typing import Any

from torch import Tensor

HEADS = ("classification", "labelling", "language_model")


def refuse(owner: object, accepted: str, **given: Any) -> ValueError:
    """The error to raise: who refuses what, and what is accepted instead."""
    name = owner if isinstance(owner, str) else type(owner).__name__
    values = ", ".join(f"{field} = {value if isinstance(value, Shape) else repr(value)}" for field, value in given.items())
    return ValueError(f"{name}: {values}; accepted is {accepted}")


def check(owner: object, holds: Any, accepted: str, *fields: str, **given: Any) -> None:
    """Refuse the fields unless `holds`."""
    if not holds:
        raise refuse(owner, accepted, **_values(owner, fields, given))


def check_sizes(owner: object, *fields: str, **sizes: Any) -> None:
    """Refuse the first size that is not a whole number from 1 up."""
    for name, value in _values(owner, fields, sizes).items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise refuse(owner, "a whole number, at least 1", **{name: value})


def check_choice(owner: object, accepted: Iterable[Any], *fields: str, **given: Any) -> None:
    """Refuse the first field that is none of `accepted`."""
    accepted = tuple(accepted)
    for name, value in _values(owner, fields, given).items():
        if value not in accepted:
            raise refuse(owner, "one of " * (len(accepted) > 1) + ", ".join(map(repr, accepted)), **{name: value})


def check_shape(owner: object, name: str, tensor: Tensor, axes: str, **sizes: int) -> None:
    """Refuse a tensor unless it has one axis per letter of `axes` ("B T D"), of the size given for that letter, if any.

    A leading "..." stands for any number of axes.
    """
    letters, shape = axes.split(), tensor.shape
    if letters[0] == "...":
        letters, shape = letters[1:], shape[max(0, tensor.dim() - len(letters) + 1) :]
    if len(shape) == len(letters) and all(sizes.get(letter, size) == size for letter, size in zip(letters, shape, strict=True)):
        return
    wanted = ", ".join(f"{letter}={sizes[letter]}" if letter in sizes else letter for letter in axes.split())
    raise refuse(owner, f"[{wanted}]", **{name: Shape(tensor.shape)})


def check_ends(config: Any, causal: bool) -> None:
    """Refuse a model's config whose inputs, head and outputs do not go together."""
    check_choice(config, HEADS, "head")
    one = (config.input_dim is None) != (config.vocab_size is None)
    check(config, one, "one of input_dim (vectors) and vocab_size (token numbers)", "input_dim", "vocab_size")
    if config.head == "language_model":
        known = config.vocab_size is not None and causal
        check(config, known, "vocab_size and a causal model: others see what they predict", "head", "vocab_size", causal=causal)
        check(config, config.output_dim in (None, config.vocab_size), "vocab_size", "output_dim", "vocab_size")
    else:
        check(config, config.output_dim is not None, "output_dim, a number", "head", "output_dim")
    learned = config.positions == "learned"
    check(config, not learned or config.max_length is not None, "max_length, a number", "positions", "max_length")


class Shape(tuple[int, ...]):
    """The shape of a tensor, written as a list."""

    def __str__(self) -> str:
        return str(list(self))


def _values(owner: object, fields: Iterable[str], given: dict[str, Any]) -> dict[str, Any]:
    return {**{name: getattr(owner, name) for name in fields}, **given}
