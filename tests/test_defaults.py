"""One value for each default: in the table of the docs, in the file of defaults, and in every signature."""

import inspect
import re
from pathlib import Path

import pytest

import bayesprune as bp
from bayesprune.foundation import defaults
from bayesprune.prune import PruneSchedule, SNRScore

DOCS = Path(__file__).parents[1] / "docs"
VALUES = {name: value for name, value in vars(defaults).items() if name.isupper() and name != "EVIDENCE"}
SIGNATURES = {
    bp.to_variational: {"std": "STD", "relative_std": "RELATIVE_STD", "estimator": "ESTIMATOR"},
    bp.attach: {"temperature": "TEMPERATURE", "std_lr": "STD_LR", "max_noise_cost": "MAX_NOISE_COST"},
    bp.distillation: {"temperature": "DISTILLATION_TEMPERATURE", "weight": "DISTILLATION_WEIGHT"},
    bp.SNRImportance: {"power": "CHANNEL_POWER"},
    SNRScore: {"power": "WEIGHT_POWER"},
    PruneSchedule: {"begin": "PRUNE_BEGIN", "end": "PRUNE_END", "num_updates": "PRUNE_UPDATES"},
}
OF_LOOPS = {"temperature": "TEMPERATURE", "warmup": "WARMUP", "std_lr": "STD_LR", "max_noise_cost": "MAX_NOISE_COST"}


def differing(function, names):
    parameters = inspect.signature(function).parameters
    return {name: parameters[name].default for name, key in names.items() if parameters[name].default != VALUES[key]}


def test_the_table_of_the_docs_is_the_file():
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| .* \| \[.*\]\((.*)\) \|$", (DOCS / "defaults.md").read_text(), re.M)
    assert {name: value for name, value, _ in rows} == {name: str(value) for name, value in VALUES.items()}
    assert {name: page for name, _, page in rows} == defaults.EVIDENCE
    assert all((DOCS / page).is_file() for page in defaults.EVIDENCE.values())


def test_signatures_take_the_defaults():
    found = {function.__name__: differing(function, names) for function, names in SIGNATURES.items()}
    assert not {name: values for name, values in found.items() if values}


def test_the_loops_of_libraries_take_the_defaults():
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    from bayesprune.hosts.timm import BayesPruneTask
    from bayesprune.hosts.transformers import BayesPruneCallback

    assert not differing(BayesPruneTask, OF_LOOPS)
    assert not differing(BayesPruneCallback, OF_LOOPS)


def test_examples_of_the_docs_do_not_repeat_or_contradict_the_schedule():
    """Recommended loops name what is to be kept, and leave the rest to the defaults."""
    for page in ("quickstart.md", "huggingface.md", "timm.md", "../README.md"):
        text = "".join(re.findall(r"```(?:python|diff)\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.S))
        assert not re.findall(r"(?:begin|end|num_updates|std_lr|max_noise_cost|warmup)=\d", text), page
