"""What a file may have timm build: names of its registry, by arguments that constructors take. timm is not needed."""

import re

ARCHITECTURE = "bayesprune_pruned"
ENTRYPOINT_ARGS = ("base", "base_args", "spec", "save_id")
# What timm.create_model does beside building: a file must not make it read other files.
NOT_FOR_BUILDING = frozenset({"model_name", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"})
NOT_FOR_BUILDING |= {"checkpoint_path", "cache_dir", *ENTRYPOINT_ARGS}
_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")


def is_plain_name(name: object) -> bool:
    """Whether it can be an architecture of timm's own: no directory, no model of the Hub, none that we saved."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None and name != ARCHITECTURE
