"""What this machine has, and which optional parts work here."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib import metadata

from cluster.tracking import INSTALL, missing

CORE = (
    "torch",
    "ray",
    "deepspeed",
    "diffusers",
    "transformers",
    "peft",
    "pydantic",
    "scikit-learn",
)
OPTIONAL = {
    "trl": "pip install 'rectify[trl]'  (TRL reward functions)",
    "datasets": "pip install 'rectify[math]'  (prompts from saved or hub datasets)",
    "math-verify": "pip install 'rectify[math]'  (the reward math_answer)",
}


def gpu_count() -> int:
    """GPUs that the driver exposes, without importing torch: this answers within milliseconds."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() not in ("", "-1")])
    try:
        return len([name for name in os.listdir("/proc/driver/nvidia/gpus")])
    except OSError:
        return 0


def diagnose() -> tuple[list[tuple[str, str]], list[str]]:
    """Facts (name, value), and what is wrong with the core installation (empty: nothing)."""
    facts = [
        ("python", platform.python_version()),
        ("cores", str(os.cpu_count())),
        ("GPUs", str(gpu_count())),
    ]
    wrong: list[str] = []
    for name in CORE:
        try:
            facts.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            facts.append((name, "missing"))
            wrong.append(f"{name} is missing: pip install -c constraints.txt -e .")
    for name in INSTALL:
        remedy = missing(name)
        facts.append((f"tracker {name}", "ready" if remedy is None else f"not here: {remedy}"))
    for name, remedy in OPTIONAL.items():
        present = importlib.util.find_spec(name.replace("-", "_")) is not None
        facts.append((name, metadata.version(name) if present else f"not here: {remedy}"))
    return facts, wrong
