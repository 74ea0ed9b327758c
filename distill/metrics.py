"""Metrics of a distillation step from the whole table of all ranks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from distill.diagnostics import discriminator_metrics
from rl.contracts import Metrics

JUDGED = ("final", "first")
# Columns that say whose row it is, and those that not every row has.
KEYS = ("seed", "slot")
PARTIAL = ("denoising",)


def distill_metrics(table: Mapping[str, np.ndarray]) -> Metrics:
    """Means of losses and errors, and how well the discriminator tells real from fake."""
    metrics: Metrics = {
        name: float(np.nanmean(column) if name in PARTIAL else column.mean())
        for name, column in table.items()
        if len(column) and name not in KEYS and not name.startswith("discriminator/")
    }
    for name in JUDGED:
        real = table.get(f"discriminator/{name}/real")
        if real is not None and len(real):
            fake = table[f"discriminator/{name}/fake"]
            found = discriminator_metrics(real, fake)
            metrics |= {f"discriminator/{name}/{key}": value for key, value in found.items()}
            metrics[f"discriminator/{name}/r1"] = float(table[f"discriminator/{name}/r1"].mean())
    return metrics
