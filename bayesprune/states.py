"""Values put into a model: `load_state_dict` of a dict that was rebuilt or filtered on the way."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn


def load_values(model: nn.Module, values: Mapping[str, Any], *, strict: bool = True) -> None:
    """`model.load_state_dict(values)`, with the versions of the modules where the values have lost them.

    A state dict says in its `_metadata` which version of a module wrote each part. A dict made from its items has none,
    which modules take for a version before the first: torchvision's MNASNet refuses it, others convert its values.

    Args:
        model: It wrote the values itself, or one of the same classes did.
        values: By state-dict name.
        strict: As for `load_state_dict`.

    Raises:
        RuntimeError: the names or shapes do not fit.
    """
    state = OrderedDict(values)
    metadata = getattr(values, "_metadata", None) or getattr(model.state_dict(), "_metadata", None)
    vars(state)["_metadata"] = metadata
    model.load_state_dict(state, strict=strict)
