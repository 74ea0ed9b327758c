"""Lets torchvision be imported beside a torch that its own compiled library does not fit.

A torchvision built for CUDA cannot load its library into a CPU torch, and then stops on import
because the operators it describes are not there. Declared without an implementation they are enough
for all that does not call them: image transforms do not. ``rectify env create`` puts this file into
such an environment, to be run when Python starts there; torch is imported when torchvision is.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
declared: list[Any] = []


class BeforeTorchvision(MetaPathFinder):
    """Finds nothing; declares the operators when torchvision is looked for."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """See ``importlib.abc.MetaPathFinder``."""
        if fullname != "torchvision":
            return
        sys.meta_path.remove(self)
        from torch.library import Library

        library = Library("torchvision", "FRAGMENT")
        for schema in SCHEMAS:
            library.define(schema)
        declared.append(library)  # what it declares goes when it goes


sys.meta_path.insert(0, BeforeTorchvision())
