"""The operators as functions on torch tensors: sarissa.ops.swr(a, u, window), ...

Importing this module loads libsarissa.so, from the path in SARISSA_LIBRARY or else from build/ of
the checkout. Each name is torch.ops.sarissa.NAME, with autograd; sarissa/ops/library.cpp lists the
schemas.
"""

import os
import pathlib

import torch

_LIBRARY = os.environ.get("SARISSA_LIBRARY") or str(
    pathlib.Path(__file__).resolve().parents[2] / "build" / "libsarissa.so")

torch.ops.load_library(_LIBRARY)


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(torch.ops.sarissa, name)
