"""The one list of what this library uses of torch-pruning although it is private there, and who needs each name.

torch-pruning has public names for building a graph, for groups and for cutting. It has none for walking a graph that
mixes up channels, for saying where they go, or for what is cut along. A release may drop a private name without a word,
so each is listed here, and a test asks for each.
"""

from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch_pruning

NAMES = {
    "_helpers.UnwrappedParameters": ("trace.py",),
    "_helpers._HybridIndex": ("mapping.py", "walk.py"),
    "dependency.DependencyGraph._build_dependency": ("mapping.py",),
    "dependency.Group._DG": ("walk.py",),
    "dependency.index_mapping._ConcatIndexMapping": ("mapping.py",),
    "dependency.index_mapping._FlattenIndexMapping": ("mapping.py",),
    "dependency.index_mapping._SliceIndexMapping": ("mapping.py",),
    "dependency.index_mapping._SplitIndexMapping": ("mapping.py",),
    "dependency.index_mapping.update_expand_index_mapping": ("mapping.py",),
    "dependency.index_mapping.update_reshape_index_mapping": ("mapping.py",),
    "dependency.index_mapping.update_unbind_index_mapping": ("mapping.py",),
    "dependency.shape_infer.infer_in_channels_recursively": ("mapping.py",),
    "dependency.shape_infer.infer_out_channels_recursively": ("mapping.py", "trace.py"),
    "ops._ElementWiseOp": ("find.py", "residual.py", "trace.py"),
    "ops._ElementWiseOp._grad_fn": ("find.py", "residual.py"),
    "pruner.function.BasePruningFunc._prune_parameter_and_grad": ("companions.py", "prunable_layers.py"),
    "utils.op_counter.MODULES_MAPPING": ("companions.py",),
}
"""Names below `torch_pruning`, and the files of this folder that need them."""

# What classes are made with whose attributes are those of an instance.
_ARGUMENTS = {"Group": (), "_ElementWiseOp": (0, "AddBackward0")}


def find(name: str) -> Any:
    """Finds the object that torch-pruning has under one of these names.

    Raises:
        ImportError: the installed torch-pruning has no such name.
    """
    found: Any = torch_pruning
    try:
        for part in name.split("."):
            if isinstance(found, ModuleType) and not hasattr(found, part):
                import_module(f"{found.__name__}.{part}")
            elif isinstance(found, type) and found.__name__ in _ARGUMENTS:
                found = found(*_ARGUMENTS[found.__name__])
            found = getattr(found, part)
    except (AttributeError, ImportError, TypeError) as error:
        files = " and ".join(f"bayesprune/prune/graph/{file}" for file in NAMES[name])
        raise ImportError(
            f"torch-pruning {version('torch-pruning')} has no torch_pruning.{name}, which {files} cannot do without; "
            "install a torch-pruning in the range that bayesprune names in its requirements."
        ) from error
    return found


UnwrappedParameters = find("_helpers.UnwrappedParameters")
HybridIndex = find("_helpers._HybridIndex")
ElementwiseOperation = find("ops._ElementWiseOp")
ConcatMapping = find("dependency.index_mapping._ConcatIndexMapping")
FlattenMapping = find("dependency.index_mapping._FlattenIndexMapping")
SliceMapping = find("dependency.index_mapping._SliceIndexMapping")
SplitMapping = find("dependency.index_mapping._SplitIndexMapping")
update_expand_index_mapping = find("dependency.index_mapping.update_expand_index_mapping")
update_reshape_index_mapping = find("dependency.index_mapping.update_reshape_index_mapping")
update_unbind_index_mapping = find("dependency.index_mapping.update_unbind_index_mapping")
infer_in_channels_recursively = find("dependency.shape_infer.infer_in_channels_recursively")
infer_out_channels_recursively = find("dependency.shape_infer.infer_out_channels_recursively")
