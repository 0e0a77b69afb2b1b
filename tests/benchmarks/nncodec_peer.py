"""Codes arrays by nncodec (ISO/IEC 15938-17), in an environment of its own: nncodec needs another NumPy.

    python tests/benchmarks/nncodec_peer.py IN.npz OUT.npz QP

Writes what the decoder gives and prints how many bytes the stream has. To make the environment:

    python -m venv NNC && NNC/bin/pip install nncodec
"""

import importlib
import sys
from pathlib import Path

import numpy as np


def main() -> None:
    """Codes, decodes, counts."""
    nncodec = importlib.import_module("nncodec.nn")
    source, out, qp = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    with np.load(source) as arrays:
        model = {name: arrays[name] for name in arrays.files}
    stream = nncodec.encode(model, args={"qp": qp, "use_dq": True, "verbose": False, "results": str(out.parent)})
    np.savez(out, **nncodec.decode(stream))
    sys.stdout.write(f"{len(stream)}\n")


if __name__ == "__main__":
    main()
