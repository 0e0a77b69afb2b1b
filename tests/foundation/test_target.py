"""The grammar of targets: what it reads, what it prints, and what it refuses."""

import re

import numpy as np
import pytest
import torch

from bayesprune.foundation.target import Target

ALL = ("macs", "params", "weights", "snr", "evidence", "inclusion", "N:M")


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("macs=0.5", "macs", 0.5),
        (" params = 0.25", "params", 0.25),
        ("weights=0", "weights", 0.0),
        ("weights=1e-3", "weights", 1e-3),
        ("snr=1", "snr", 1.0),
        ("evidence=-2.5", "evidence", -2.5),
        ("inclusion=0.5", "inclusion", 0.5),
        ("2:4", "N:M", 0.5),
    ],
)
def test_a_target_is_read_and_written(text, kind, value):
    target = Target.parse(text, ALL, "test")
    assert (target.kind, target.value, target.removed) == (kind, value, 1 - value)
    assert Target.parse(str(target), ALL, "test") == Target.parse(target, (kind,), "test") == target


@pytest.mark.parametrize("text", ["", "macs", "macs=", "macs=half", "=0.5", "flops=0.5", "2:4:8", "2:", ":", 0.5, None])
def test_what_is_no_target_is_refused_with_all_that_would_be(text):
    expected = re.escape(f'prune got the target {text!r}; expected a text like "macs=0.5" (half') + '.*, "2:4" '
    with pytest.raises(ValueError, match=expected):
        Target.parse(text, ALL, "prune")


def test_what_is_no_target_is_shown_in_short():
    """As where the target and the data changed places."""
    with pytest.raises(ValueError, match=r"prune got the target \[tensor\(.{5,30}\)\]; expected a text like"):
        Target.parse([torch.randn(100, 100)], ALL, "prune")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "macs=0",
        "macs=1",
        "params=nan",
        "weights=-0.1",
        "weights=1.1",
        "snr=-1",
        "snr=inf",
        "evidence=nan",
        "inclusion=0",
    ],
)
def test_numbers_out_of_range_are_refused(text):
    with pytest.raises(ValueError, match=f"got the target '{text}'; expected"):
        Target.parse(text, ALL, "prune")


@pytest.mark.parametrize("text", ["4:2", "0:4", "2:2", "1:0"])
def test_patterns_keep_some_of_each_block(text):
    with pytest.raises(ValueError, match=f"got the target '{text}'; expected \"N:M\" with 0 < N < M"):
        Target.parse(text, ALL, "prune")


def test_numbers_of_other_types_are_numbers():
    assert str(Target("macs", np.float64(0.5))) == str(Target("macs", torch.tensor(0.5))) == "macs=0.5"


def test_a_caller_takes_its_own_kinds_alone():
    with pytest.raises(ValueError, match=r'got the target .macs=0.5.; expected a text like "weights=0.2"'):
        Target.parse("macs=0.5", ("weights",), "prune_weights")
