"""A model card beside the saved model, and the upload of both."""

import json
import shutil

import pytest
import torch
from huggingface_hub import RepoUrl

import bayesprune as bp
from bayesprune.errors import UnsupportedModelError

transformers = pytest.importorskip("transformers")
pytest.importorskip("bayesprune.hosts.transformers")

from bayesprune.hosts.transformers import hub, model_card, push_to_hub, save_with_card  # noqa: E402
from tests.hosts.transformers.saved import TOKENS, bert, cut, outputs  # noqa: E402


def compressed() -> tuple[torch.nn.Module, bp.reports.Report]:
    before, after = bert(), cut(bert())
    return after, bp.report(before, after, TOKENS, num_repeats=0, title="half | of it")


def test_card_says_what_was_measured_and_how_to_load(tmp_path):
    model, report = compressed()
    save_with_card(model, tmp_path / "small-bert", report=report)
    card = (tmp_path / "small-bert" / "README.md").read_text()
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert "library_name: transformers" in head
    assert "- bayesprune" in head
    assert "# small-bert" in body
    assert "import bayesprune" in body
    assert 'BertForSequenceClassification.from_pretrained("small-bert")' in body
    rows = [line for line in body.splitlines() if line.startswith("| parameters |")]
    assert len(rows) == 1
    assert f"{sum(p.numel() for p in model.parameters()):,}" in rows[0]
    assert all(line.count("|") == 6 for line in body.splitlines() if line.startswith("|"))
    record = json.loads((tmp_path / "small-bert" / "bayesprune.json").read_text())
    assert record["report"]["after"]["parameters"] == report.after.parameters
    assert torch.equal(outputs(bp.load(tmp_path / "small-bert")), outputs(model))


def test_card_of_a_dense_model_asks_for_transformers_alone():
    card = model_card(bert(), name="someone/bert")
    assert "import bayesprune" not in card
    assert "pip install transformers" in card
    assert "What was measured" not in card


def test_card_of_another_module():
    with pytest.raises(UnsupportedModelError, match="got a Linear"):
        model_card(torch.nn.Linear(2, 2), name="linear")


def test_upload_holds_the_directory(tmp_path, monkeypatch):
    """The Hub is a folder here."""
    calls = []

    class Hub:
        def __init__(self, token):
            calls.append(("token", token))

        def create_repo(self, repo_id, private, exist_ok):
            calls.append(("create_repo", repo_id, private, exist_ok))
            return RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append(("upload_folder", repo_id))
            shutil.copytree(folder_path, tmp_path / "hub")

    monkeypatch.setattr(hub, "HfApi", Hub)
    model, report = compressed()
    url = push_to_hub(model, "someone/small-bert", report=report, private=True, token="secret")
    assert url == "https://huggingface.co/someone/small-bert"
    assert calls == [
        ("token", "secret"),
        ("create_repo", "someone/small-bert", True, True),
        ("upload_folder", "someone/small-bert"),
    ]
    assert 'from_pretrained("someone/small-bert")' in (tmp_path / "hub" / "README.md").read_text()
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hub")
    assert torch.equal(outputs(loaded), outputs(model))
