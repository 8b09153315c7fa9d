"""Strict reading: YAML without surprises, entries with exact types and known keys, and messages of one line."""

import difflib
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from nsm_book import BookError


def brief(value: Any) -> str:
    """A value as a message shows it: on one line, and not longer than a person reads."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes out no number of more than 4,300 digits, and no deep nest
        text = f"{type(value).__name__} too large to show"
    return text if len(text) <= 120 else f"{text[:100]}… ({len(text)} characters)"


def one_line(text: Any) -> str:
    """Another's message on one line, of no more than a person reads."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(text).split()))[:200]


def unknown(what: str, given: Any, accepted: Iterable[str]) -> str:
    """The sentence for a name that is not known: what was given, the nearest accepted name, and all of them."""
    accepted = list(accepted)
    near = difflib.get_close_matches(given[:100] if isinstance(given, str) else "", accepted, n=1)
    hint = f"; nearest: {near[0]}" if near else ""
    return f"unknown {what} {brief(given)}{hint}; accepted: {', '.join(accepted) or 'none'}"


class _Loader(yaml.SafeLoader):
    """YAML in which no key stands twice, and which no alias can blow up."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "accepts no aliases", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is one name", key.start_mark)
            if key.value in seen:
                problem = f"key {brief(key.value)}: accepts each name once"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


@lru_cache(maxsize=32)
def parse_yaml(text: str) -> Any:
    """What a YAML text holds, to be read only; a ValueError of one line names the line that is no YAML, or repeats a key."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ValueError(f"line {line}: {one_line(error.problem)}") from None
    # What PyYAML raises where a value is not of its tag: `!!bool maybe`, `!!int ""`, `!!timestamp x`, 1:1:1…
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"is no YAML: {one_line(error)}") from None


class Entry(BaseModel):
    """An entry of a YAML file: exact types, known keys, no key without a value."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            raise ValueError(f"accepts the keys {', '.join(cls.model_fields)}; got {brief(given)}")
        for key, value in given.items():
            if key not in cls.model_fields:
                raise ValueError(unknown("key", key, cls.model_fields))
            if value is None:
                raise ValueError(f"{key}: has no value")
        return given


Model = TypeVar("Model", bound=Entry)


def validate(model: type[Model], given: Any, where: str) -> Model:
    """What was given as such an entry; a BookError says the first thing that is wrong, with its place."""
    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    inside = first["loc"][:-2] if first["loc"][-1:] == ("[key]",) else first["loc"]
    place = ": ".join([where, *(one_line(f"entry {part + 1}" if isinstance(part, int) else part) for part in inside)])
    if first["type"] == "value_error":  # raised by this module: it says what was given
        raise BookError(f"{place}: {first['ctx']['error']}")
    given = "nothing" if first["type"] == "missing" else brief(first["input"])
    raise BookError(f"{place}: {one_line(first['msg'])}, got {given}")
