"""The one refusal and the one writer that everything shares."""

import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from nsm_support.checks import check, check_choice, check_shape, check_sizes
from nsm_support.extras import extra
from nsm_support.files import write_json, write_whole


@dataclass
class Sizes:
    width: object = 4
    kind: str = "a"


@pytest.mark.parametrize("wrong", [0, -1, 1.0, True, "4", None, float("nan"), 10.5])
def test_a_size_is_a_whole_number_from_one_up(wrong):
    with pytest.raises(ValueError, match=rf"^Sizes: width = {wrong!r}; accepted is a whole number, at least 1$"):
        check_sizes(Sizes(wrong), "width")
    check_sizes("function", width=np.int64(4), depth=1)


@pytest.mark.parametrize(
    ("refuse", "message"),
    [
        (lambda: check(Sizes(), False, "even", "width", depth=3), "Sizes: width = 4, depth = 3; accepted is even"),
        (lambda: check_choice(Sizes(), ("b", "c"), "kind"), "Sizes: kind = 'a'; accepted is one of 'b', 'c'"),
        (lambda: check_choice("f", (None,), kind="a"), "f: kind = 'a'; accepted is None"),
        (lambda: check_shape("f", "x", torch.zeros(2, 3), "B T D", D=4), "f: x = [2, 3]; accepted is [B, T, D=4]"),
        (lambda: check_shape("f", "x", torch.zeros(2, 3), "B D", D=4), "f: x = [2, 3]; accepted is [B, D=4]"),
        (lambda: check_shape("f", "x", torch.zeros(2, 3), "... D", D=4), "f: x = [2, 3]; accepted is [..., D=4]"),
        (lambda: check_shape("f", "x", torch.zeros(()), "... D", D=4), "f: x = []; accepted is [..., D=4]"),
    ],
)
def test_a_refusal_says_who_what_and_what_instead(refuse, message):
    with pytest.raises(ValueError) as refused:
        refuse()
    assert str(refused.value) == message


def test_what_fits_passes():
    check(Sizes(), True, "anything", "width")
    check_choice(Sizes(), ("a", "b"), "kind")
    for axes, shape in (("B D", (2, 4)), ("... D", (4,)), ("... D", (2, 3, 4)), ("... T D", (5, 3, 4)), ("D", (4,))):
        check_shape("f", "x", torch.zeros(shape), axes, D=4)


def test_a_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"ß": 1})
    write_whole(tmp_path / "y", b"\r\n")
    assert path.read_bytes() == '{"ß": 1}'.encode() and (tmp_path / "y").read_bytes() == b"\r\n"
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, float("nan"))
    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
            patch.setattr(os, step, lambda *given: (_ for _ in ()).throw(OSError("disk full")))
            write_whole(path, "new")
    assert path.read_text() == '{"ß": 1}' and {file.name for file in tmp_path.iterdir()} == {"x.json", "y"}


def test_a_missing_extra_is_named():
    with pytest.raises(ImportError, match=r"^nowhere is not installed; .* pip install 'nsm-support\[book\]'$"), extra("book"):
        import nowhere  # noqa: F401
