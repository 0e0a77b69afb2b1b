"""What the smaller model has lost beside accuracy, as tables of the report."""

import copy
from dataclasses import replace

from torch import nn

from bayesprune.app.tasks.task import Task
from bayesprune.convert import to_variational
from bayesprune.errors import UnsupportedFunctionError
from bayesprune.laplace import fit_laplace
from bayesprune.reports import ExtraTable
from bayesprune.robustness import robustness


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
