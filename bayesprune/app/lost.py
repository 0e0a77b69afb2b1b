"""What the smaller model has lost, as the report says it: the test scores, and tables of what else there is."""

import copy
import math
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bayesprune.app.tasks.task import Task
from bayesprune.convert import to_variational
from bayesprune.errors import UnsupportedFunctionError
from bayesprune.laplace import fit_laplace
from bayesprune.reports import ExtraTable, Report
from bayesprune.robustness import robustness


def with_scores(found: Report, before: float, after: float) -> Report:
    """The report with both models' test scores; one that is no finite number is left out, and said."""
    measured, notes = [], list(found.notes)
    for measurement, score in ((found.before, before), (found.after, after)):
        measured.append(replace(measurement, accuracy=score if math.isfinite(score) else None))
        if not math.isfinite(score):
            notes.append(
                f"The test {found.metric.name} {measurement.label} is {score}, which is no finite number and has "
                "no place in the table. Look for NaN and infinity in the test data and in the model's outputs."
            )
    return replace(found, before=measured[0], after=measured[1], notes=tuple(notes))


def check_images(example_inputs: Any) -> None:
    """Refuses inputs that cannot be corrupted.

    Raises:
        ValueError: there is no image among them.
    """
    tensors = [value for value in tree_leaves(example_inputs) if isinstance(value, Tensor)]
    if not any(tensor.dim() == 4 and tensor.is_floating_point() for tensor in tensors):
        raise ValueError(
            "corruptions are for images, and an example has none; expected a tensor of floats (N, C, H, W) among its "
            "inputs. Leave corruptions out."
        )


def what_was_lost(dense: nn.Module, small: nn.Module, task: Task, *, num_batches: int) -> tuple[ExtraTable, ...]:
    """Both models on corrupted images, and their probabilities by the weights and by one pass over a posterior."""
    models = {"before": dense, "after": small}
    tables = robustness(models, task.examples("test")).tables()
    posteriors = {name: to_variational(copy.deepcopy(model)) for name, model in models.items()}
    for posterior in posteriors.values():
        fit_laplace(posterior, task.calibration, num_batches=num_batches)
    try:
        scores = robustness(posteriors, task.examples("test"), corruptions=()).tables()[1]
    except UnsupportedFunctionError:
        return tables  # a layer without a rule for moments
    return *tables, replace(scores, title=f"{scores.title}, by one pass over a Laplace posterior")
