"""The command line: the main job end to end on little data, and what it says to wrong input."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bayesprune as bp
from bayesprune.app.data.images import load_data
from bayesprune.app.tasks.loop import LoaderTask
from tests.commands import run

pytest.importorskip("timm")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

SMALL = ["--epochs", "1", "--image-size", "16", "--model", "timm:test_resnet"]
COUNTS = {"train": 12, "validation": 4, "test": 4}


@pytest.fixture(scope="module")
def few_digits(tmp_path_factory):
    """A folder with a few images of each class."""
    folder, image = tmp_path_factory.mktemp("digits"), pytest.importorskip("PIL.Image")
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    for label in range(10):
        pixels = iter((digits.images[digits.target == label] * 15).astype("uint8"))
        for split, count in COUNTS.items():
            (folder / split / str(label)).mkdir(parents=True)
            for number in range(count):
                image.fromarray(next(pixels)).save(folder / split / str(label) / f"{number}.png")
    return str(folder)


@pytest.fixture(scope="module")
def compressed(few_digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "digits"
    options = ["--out", str(out), "--data", few_digits, *SMALL, "--corruptions"]
    command = [sys.executable, "-m", "bayesprune", "compress", *options]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process: sums depend on how they are split
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=one_thread)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_compress_leaves_a_smaller_model_that_loads(compressed, few_digits):
    out, text = compressed
    model = bp.load(out)
    assert sum(p.numel() for p in model.parameters()) < 0.9 * 373_658
    assert all(stage in text for stage in ("[1/4]", "[4/4]", "epoch 1/1"))
    report = json.loads((out / "report.json").read_text())
    assert report["after"]["macs"] <= 0.5 * report["before"]["macs"]
    images, _ = next(iter(load_data(few_digits, image_size=16).test))
    assert model(images).shape == (40, 10)


def test_corruptions_stand_in_the_report_and_its_page(compressed, capsys):
    out, text = compressed
    assert "jpeg_compression" in text
    tables = json.loads((out / "report.json").read_text())["tables"]
    assert [table["title"].partition(",")[0] for table in tables] == [
        "Accuracy on corrupted images",
        "What the probabilities are worth",
        "What the probabilities are worth",
    ]
    assert [row[0] for row in tables[0]["rows"]] == ["none", *bp.robustness.CORRUPTIONS]
    assert "AUROC of foreign images" in (out / "report.html").read_text()
    code, text, _ = run(capsys, "report", str(out))
    assert code == 0
    assert "gaussian_noise" in text


def test_report_and_inspect_show_it_again(compressed, capsys):
    out, _ = compressed
    code, text, _ = run(capsys, "report", str(out))
    assert code == 0
    assert "MAC" in text
    code, text, _ = run(capsys, "inspect", str(out))
    assert code == 0
    assert "test_resnet" in text
    assert "fc.weight" in text


def test_inspect_names_the_levels(tmp_path, capsys):
    model = torch.nn.Linear(4, 4).eval()
    sparse = copy.deepcopy(model)
    sparse.weight.data[0] = 0
    bp.save(model, tmp_path, levels=[bp.elastic.Level("weights=0.7", sparse)])
    _, text, _ = run(capsys, "inspect", str(tmp_path))
    assert "level weights=0.7: 80 bytes of tensors" in text


def test_the_same_seed_gives_the_same_model(compressed, few_digits, tmp_path, capsys):
    out, _ = compressed
    code, _, _ = run(capsys, "compress", "--out", str(tmp_path), "--data", few_digits, *SMALL)
    assert code == 0
    one, other = bp.load(out).state_dict(), bp.load(tmp_path).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "macs=half"], "expected"),
        (["--target", "mac=0.5"], "expected a text like"),
        (["--target", "macs=0.001"], "channels keeps a tenth. What stays"),
        (["--target", "weights=1e-6"], "larger fraction, or in Python for no floor"),
        (["--tolerance", "-0.1"], "0 or more"),
        (["--target", "macs=0.5", "--tolerance", "0.01"], "one of them"),
        (["--target", "snr", "--tolerance", "0.01"], "one of them"),
        (["--target", "weights", "--tolerance", "0.01", "--uniform"], "uniform"),
        (["--target", "weights"], "expected"),
        (["--model", "resnet18"], "timm:NAME"),
        (["--model", "hf:"], "hf:NAME"),
        (["--target", "weights=1.5"], "from 0 to 1"),
        (["--target", "weights=0.5", "--uniform"], "uniform"),
        (["--granularity", "heads,hands"], "expected some of"),
        (["--granularity", "heads, mlp", "--target", "macs=0.001"], "cannot be reached"),
        (["--tolerance", "0.01", "--granularity", "hands"], "expected some of"),
        (["--task", "causal-lm"], "timm's"),
        (["--text-column", "words"], "for texts"),
        (["--model", "timm:resnet1800"], "no architecture"),
        (["--data", "no/such/folder"], "no folder"),
        (["--checkpoint", "missing.pth"], "no checkpoint"),
        (["--epochs", "0"], "--epochs"),
        (["--image-size", "-3"], "--image-size"),
        (["--seed", "-1"], "--seed"),
        (["--lr", "nan"], "lr is nan"),
        (["--train-lr", "-1"], "train_lr is -1"),
        (["--download"], "for images of torch/NAME"),
        (["--data-dir", "images"], "for images of torch/NAME and hfds/NAME"),
        (["--gates"], "gates choose single weights"),
        (["--target", "weights=0.1", "--gates", "--std", "per_weight"], "learn none"),
        (["--bits", "1"], "--bits"),
        (["--coding", "zip"], "expected entropy"),
        (["--levels", "macs=0.5,half"], "levels got the target 'half'"),
        (["--corruptions", "--model", "hf:here", "--task", "causal-lm"], "for images"),
        (["--std", "per_kernel"], "per_channel"),
        (["--std", "per_weight"], "learn none"),
        (["--estimator", "flipout"], "no stds are learned"),
        (["--device", "abacus"], "cannot be used here"),
        (["--device", "cuda:99"], "cannot be used here"),
    ],
)
def test_wrong_input_is_told_before_any_training(arguments, said, tmp_path, capsys):
    code, out, err = run(capsys, "compress", "--out", str(tmp_path / "out"), *arguments)
    assert code != 0
    assert said in out + err
    assert "epoch" not in out


def test_an_output_that_is_a_file_is_told_before_any_training(tmp_path, capsys):
    path = tmp_path / "taken"
    path.write_text("")
    code, out, err = run(capsys, "compress", "--out", str(path))
    assert code == 1
    assert "taken" in err
    assert "epoch" not in out


def test_the_result_is_not_written_over_the_checkpoint(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"trained")
    written = tmp_path / ".." / tmp_path.name
    code, out, err = run(capsys, "compress", "--out", str(written), "--checkpoint", str(path))
    assert code != 0
    assert "overwrite" in out + err
    assert path.read_bytes() == b"trained"


def test_a_path_of_any_letters_stands_in_the_line_that_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(bp, "load", lambda directory: directory)
    for name in ("digits", "größe", 'a "b"', "C:\\new\\table"):
        exec(LoaderTask.loading_instructions(None, Path(name)), named := {})
        assert named["model"] == name


def test_report_of_a_directory_without_one(tmp_path, capsys):
    code, out, err = run(capsys, "report", str(tmp_path))
    assert code != 0
    assert "report.json" in out + err


@pytest.mark.parametrize(
    ("missing", "extra"), [("matplotlib", "report"), ("sklearn.datasets", "digits"), ("constriction", "coding")]
)
def test_a_missing_extra_is_told_before_any_training(missing, extra, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    options = ("--coding", "entropy") if extra == "coding" else ()
    code, out, err = run(capsys, "compress", "--out", str(tmp_path / "out"), *options)
    assert code == 1
    assert f"bayesprune[{extra}]" in "".join(err.split())
    assert "epoch" not in out


@pytest.mark.parametrize("kind", ["other shapes", "not a checkpoint"])
def test_a_checkpoint_that_does_not_fit_is_told(kind, tmp_path, capsys):
    path = tmp_path / "weights.pth"
    if kind == "other shapes":
        torch.save({"fc.weight": torch.zeros(7, 512)}, path)
    else:
        path.write_bytes(b"no tensors in here")
    code, out, err = run(capsys, "compress", "--out", str(tmp_path / "out"), "--checkpoint", str(path))
    assert code == 1
    assert "weights.pth" in "".join(err.split())
    assert "does not fit" in " ".join(err.split())
    assert "epoch" not in out
