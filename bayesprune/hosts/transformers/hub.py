"""A saved directory to show to others: the model, and a card with what was measured of it."""

import json
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from transformers.modeling_utils import PreTrainedModel

from bayesprune.errors import UnsupportedModelError
from bayesprune.hosts.transformers.host import changes, hf_base, skeleton
from bayesprune.reports import Report
from bayesprune.reports.summary import quantities
from bayesprune.storage import save
from bayesprune.storage.spec import describe_model

CARD = "README.md"


def save_with_card(
    model: PreTrainedModel, directory: str | Path, *, name: str | None = None, report: Report | None = None
) -> Path:
    """Writes what `bayesprune.save` writes, and the model card `README.md`; returns the directory.

    Args:
        model: A model of transformers, variational or not.
        directory: Made where it is missing. A `README.md` that is there is replaced.
        name: What the card's example loads; the directory's name by default.
        report: From `bayesprune.report`; its table stands in the card, all of it in `bayesprune.json`.

    Raises:
        UnsupportedModelError: the model is not of transformers.
        StorageError: as `bayesprune.save`.
    """
    card = model_card(model, name=name or Path(directory).name, report=report)
    save(model, directory, report=None if report is None else json.loads(report.to_json()))
    (Path(directory) / CARD).write_text(card, encoding="utf-8")
    return Path(directory)


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    report: Report | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload a model compressed with bayesprune",
) -> str:
    """Saves the model with its card and uploads the files to a repository of the Hub; returns the repository's URL.

    Args:
        model: A model of transformers, variational or not.
        repo_id: "name" or "organisation/name"; made where it is missing.
        report: For the card.
        private: For a repository that is made.
        token: None is the one that `hf auth login` stored.
        commit_message: Of the upload.

    Raises:
        UnsupportedModelError: the model is not of transformers.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_with_card(model, folder, name=repo_id, report=report)
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message=commit_message)
        return str(repo)


def model_card(model: PreTrainedModel, *, name: str, report: Report | None = None) -> str:
    """The card as Markdown with the Hub's metadata at its top.

    Raises:
        UnsupportedModelError: the model is not of transformers.
    """
    base = hf_base(model)
    if base is None:
        raise UnsupportedModelError(
            f"a card got a {type(model).__name__}; expected a model class of transformers itself. Use bayesprune.save."
        )
    dense = skeleton(base)
    is_changed = changes(describe_model(model, dense).to_json(), dense) is not None
    imports = ["import bayesprune  # lets transformers build the smaller layers"] if is_changed else []
    installs = "bayesprune transformers" if is_changed else "transformers"
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        "---",
        "library_name: transformers",
        "tags:",
        "- bayesprune",
        "- pruning",
        "---",
        "",
        f"# {name}",
        "",
        f"A {base.name} of {num_parameters:,} parameters, compressed with bayesprune.",
        "",
        "```python",
        f"# pip install {installs}",
        *imports,
        f"from transformers import {base.name}",
        "",
        f'model = {base.name}.from_pretrained("{name}")',
        "```",
    ]
    return "\n".join(lines + ([] if report is None else _measured(report))) + "\n"


def _measured(report: Report) -> list[str]:
    head = ("", "unit and method", report.before.label, report.after.label, "ratio")
    rows = [(row.name, row.terms, row.before_text, row.after_text, row.change) for row in quantities(report)]
    table = [_row(head), "|---|---|---:|---:|---:|", *map(_row, rows)]
    notes = [f"- {note}" for note in report.notes]
    return ["", "## What was measured", "", *table, *(["", *notes] if notes else [])]


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
