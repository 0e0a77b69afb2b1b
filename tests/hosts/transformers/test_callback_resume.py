"""A run that was interrupted and resumed is the run that was not."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, ViTConfig, ViTForImageClassification

import bayesprune as bp
from bayesprune.errors import StorageError
from bayesprune.hosts.transformers import BayesPruneCallback, PruneSchedule, Tolerance, checkpoint
from bayesprune.hosts.transformers.checkpoint import FILE_NAME
from tests.hosts.transformers import tiny

STEPS = 10
SAVED = 7  # in the second epoch of six steps, while the sparsity rises
BUILD = {"bert": tiny.bert, "llama": tiny.llama}


def callback(**options) -> BayesPruneCallback:
    schedule = PruneSchedule("weights=0.4", begin=0.25, end=0.75)
    return BayesPruneCallback(prune=schedule, warmup=0.9, convert={"std": "rank_one"}, **options)


def build(name: str, directory: Path | str, *others: TrainerCallback, **options):
    defaults = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVED, "gradient_accumulation_steps": 2}
    defaults["logging_steps"] = SAVED  # the Trainer averages the loss from where it resumed
    sizes = {"attention_dropout": 0.1} if name == "llama" else {"hidden_dropout_prob": 0.1}
    return tiny.trainer(BUILD[name](**sizes), directory, callback(), *others, **defaults | options)


class Interrupt(TrainerCallback):
    """Ends the run, or the process, after this step."""

    def __init__(self, step: int, *, kills: bool = False) -> None:
        self.step, self.kills = step, kills

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            if self.kills:
                os.kill(os.getpid(), signal.SIGKILL)
            control.should_training_stop = True


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), f"{name}: {(found[name].float() - value.float()).abs().max():.3g}"


@pytest.mark.parametrize("name", BUILD)
def test_resumed_in_the_middle(name, tmp_path):
    whole = build(name, tmp_path / "whole")
    whole.train()
    expected = whole.model.state_dict()
    assert any(key.endswith("_mask") and not value.all() for key, value in expected.items())
    build(name, tmp_path / "parts", Interrupt(SAVED + 1)).train()
    resumed = build(name, tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    assert_equal(resumed.model.state_dict(), expected)
    logs = [[e for e in run.state.log_history if "nll" in e] for run in (whole, resumed)]
    for a, b in zip(*logs, strict=True):
        assert a == b


def test_resumed_with_an_optimizer_that_the_user_made(tmp_path):
    def build_own(directory, *others):
        model = tiny.llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        args = tiny.arguments(directory, max_steps=4, save_strategy="steps", save_steps=2)
        callbacks = [callback(), *others]
        return Trainer(model, args, train_dataset=tiny.language(), callbacks=callbacks, optimizers=(optimizer, None))

    whole = build_own(tmp_path / "whole")
    whole.train()
    build_own(tmp_path / "parts", Interrupt(2)).train()
    resumed = build_own(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    assert_equal(resumed.model.state_dict(), whole.model.state_dict())


def test_the_last_checkpoint_is_named_by_true(tmp_path):
    """As `train` takes it, `TrainingArguments` may say it, too."""
    build("llama", tmp_path, Interrupt(SAVED)).train()
    made = build("llama", tmp_path, resume_from_checkpoint=True)
    made.train(resume_from_checkpoint=made.args.resume_from_checkpoint)
    assert made.state.global_step == STEPS


def test_the_state_is_one_file_without_pickle(tmp_path):
    build("llama", tmp_path, Interrupt(SAVED)).train()
    with safe_open(tmp_path / f"checkpoint-{SAVED}" / FILE_NAME, "pt") as file:
        about = json.loads(file.metadata()["bayesprune"])
        assert {key.rsplit("/", 1)[1] for key in file.keys()} == {"step", "exp_avg", "exp_avg_sq"}  # noqa: SIM118
    assert about["about"]["num_data"] == sum(label != -100 for row in tiny.language() for label in row["labels"][1:])
    assert dict(about["outline"]["dict"])["step"] == SAVED
    assert not [*tmp_path.rglob("*.partial")]


@pytest.mark.parametrize("should_save", [True, False])
def test_each_process_gathers_where_there_is_no_directory(should_save, tmp_path, monkeypatch):
    """As in a search for hyperparameters: a process that did not would leave the others waiting for it."""
    gathered = []
    monkeypatch.setattr(checkpoint, "whole_values", lambda state: gathered.append(state) or state)
    model = bp.to_variational(tiny.llama())
    attachment = bp.attach(torch.optim.SGD(model.parameters()), model, num_data=1)
    args = SimpleNamespace(output_dir=str(tmp_path), should_save=should_save)
    checkpoint.write(args, 3, attachment, model)
    assert len(gathered) == 1
    assert not [*tmp_path.rglob("*")]


def test_resumed_from_elsewhere(tmp_path):
    """Callbacks are not told the folder; a state of other weights under the same name is not taken."""
    build("llama", tmp_path / "first", Interrupt(SAVED)).train()
    source = tmp_path / "first" / f"checkpoint-{SAVED}"
    with pytest.raises(StorageError, match=rf"resumes at step {SAVED}, but there is no .*resume_from_checkpoint="):
        build("llama", tmp_path / "second").train(resume_from_checkpoint=str(source))
    build("llama", tmp_path / "third", Interrupt(SAVED), seed=7, learning_rate=3e-3).train()
    with pytest.raises(StorageError, match="has other stds than the model that was loaded"):
        build("llama", tmp_path / "third").train(resume_from_checkpoint=str(source))
    made = build("llama", tmp_path / "second", resume_from_checkpoint=str(source))
    made.train(resume_from_checkpoint=str(source))
    assert made.state.global_step == STEPS


def test_a_checkpoint_of_another_prior_is_refused(tmp_path):
    build("llama", tmp_path, Interrupt(SAVED)).train()
    other = tiny.trainer(
        tiny.llama(attention_dropout=0.1),
        tmp_path,
        callback(prior=bp.priors.ARD()),
        max_steps=STEPS,
        gradient_accumulation_steps=2,
    )
    with pytest.raises(ValueError, match="expected the prior of the run that was saved"):
        other.train(resume_from_checkpoint=True)


def tolerated(directory: Path, *others: TrainerCallback, save_steps: int, then="rollback", drop=0.0):
    """Evaluated every four steps; the weights go at the tenth, so that the evaluation of step 12 ends the training."""
    schedule, tolerance = (
        PruneSchedule("weights=0.05", begin=0.5, end=0.5),
        Tolerance(drop, "accuracy", then, reference=0.0),
    )
    made = BayesPruneCallback(prune=schedule, tolerance=tolerance)
    options = {"max_steps": 20, "eval_strategy": "steps", "eval_steps": 4}
    made = tiny.trainer(tiny.bert(), directory, made, *others, save_strategy="steps", save_steps=save_steps, **options)
    made.compute_metrics = lambda _: {"accuracy": -float(made.state.global_step >= 12)}
    return made


@pytest.mark.parametrize("then", ["rollback", "stop"])
def test_a_run_that_the_tolerance_had_ended_stays_ended(then, tmp_path):
    """The checkpoint of its last step has the model that it ended with."""
    whole = tolerated(tmp_path, save_steps=4, then=then)
    whole.train()
    assert whole.state.global_step == 12
    expected = {key: value.clone() for key, value in whole.model.state_dict().items()}
    resumed = tolerated(tmp_path, save_steps=4, then=then)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert resumed.state.global_step == 13, "the Trainer takes a step before it can be ended"
    assert_equal(resumed.model.state_dict(), expected)
    more = tolerated(tmp_path, save_steps=4, then=then, drop=2.0)
    more.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert more.state.global_step == 20, "another tolerance lets it go on"


def test_a_resumed_run_rolls_back_to_what_was_evaluated(tmp_path):
    """Not to the checkpoint, which lies between two evaluations."""
    whole = tolerated(tmp_path / "whole", save_steps=10)
    whole.train()
    assert whole.state.global_step == 12
    tolerated(tmp_path / "parts", Interrupt(11), save_steps=10).train()
    resumed = tolerated(tmp_path / "parts", save_steps=10)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12
    assert_equal(resumed.model.state_dict(), whole.model.state_dict())


def vit(directory: Path, **options):
    """In memory its layers have other names than on disk."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = ViTForImageClassification(ViTConfig(image_size=4, patch_size=2, **sizes))
    data = [{"pixel_values": torch.randn(3, 4, 4).tolist(), "labels": index % 2} for index in range(8)]
    defaults = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    if options.pop("mended", False):
        model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    args = tiny.arguments(directory, **defaults | options)
    return Trainer(model, args, train_dataset=data, eval_dataset=data, callbacks=[BayesPruneCallback()])


def test_a_model_of_which_the_trainer_loads_nothing(tmp_path):
    """It says no more than "missing keys", and would go on from the start's weights; the mend is in the message."""
    whole = vit(tmp_path)
    whole.train()
    with pytest.raises(StorageError, match="If the Trainer said that keys were missing.*save_original_format=False"):
        vit(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    vit(tmp_path / "mended", mended=True).train()
    resumed = vit(tmp_path / "mended", mended=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "mended" / "checkpoint-2"))
    assert_equal(resumed.model.state_dict(), whole.model.state_dict())


@pytest.mark.parametrize("mended", [False, True])
def test_a_best_model_of_which_the_trainer_loads_nothing(mended, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "mended": mended}
    made = vit(tmp_path, metric_for_best_model="snr_median", greater_is_better=True, **options)
    if mended:
        made.train()
        values = {entry["step"]: entry["eval_snr_median"] for entry in made.state.log_history if "eval_loss" in entry}
        assert made.evaluate()["eval_snr_median"] == max(values.values())
        assert made.state.best_global_step == 2
    else:
        with pytest.warns(UserWarning, match="the best model, .*checkpoint-2, was not loaded.*save_original_format"):
            made.train()


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    """Three processes: one that is killed between two checkpoints, one that resumes, one that was never stopped."""
    repository = Path(__file__).parents[3]
    program = "from tests.hosts.transformers.test_callback_resume import main; import sys; main(*sys.argv[1:])"
    codes = {}
    for directory, mode in (("killed", "kill"), ("killed", "resume"), ("whole", "whole")):
        command = [sys.executable, "-c", program, str(tmp_path / directory), mode]
        codes[mode] = subprocess.run(command, cwd=repository, timeout=250, check=False).returncode
    assert codes == {"kill": -signal.SIGKILL, "resume": 0, "whole": 0}
    assert (tmp_path / "killed" / f"checkpoint-{SAVED}").is_dir()
    runs = [load_file(tmp_path / name / "final" / "model.safetensors") for name in ("killed", "whole")]
    assert_equal(*runs)


def main(directory: str, mode: str) -> None:
    torch.set_num_threads(1)
    made = build("llama", directory, *([Interrupt(SAVED + 1, kills=True)] if mode == "kill" else []))
    made.train(resume_from_checkpoint=mode == "resume")
    made.save_model(f"{directory}/final")
