"""Save and load: safetensors and JSON, no pickle; a saved directory says all that is needed to build the model again.

`save` compares the model with its base, built anew, and writes what differs. `load` builds the base, changes it
accordingly, and reads the tensors strictly. A library whose models can be named and built takes part with
`register_adapter`.
"""

from bayesprune.storage.base import BaseModel, LibraryAdapter, register_adapter
from bayesprune.storage.load import load
from bayesprune.storage.save import save

__all__ = ["BaseModel", "LibraryAdapter", "load", "register_adapter", "save"]
