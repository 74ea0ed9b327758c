"""What this machine has, and which optional parts work here."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from cluster.tracking import INSTALL, missing

if TYPE_CHECKING:
    from rewards.contract import RewardSettings

CORE = (
    "torch",
    "ray",
    "deepspeed",
    "diffusers",
    "transformers",
    "peft",
    "pydantic",
    "scikit-learn",
    "av",
)
OPTIONAL = {
    "trl": "pip install 'rectify[trl]'  (TRL reward functions)",
    "datasets": "pip install 'rectify[math]'  (prompts from saved or hub datasets)",
    "math-verify": "pip install 'rectify[math]'  (the reward math_answer)",
}


# owner/name of the hub, or a file there.
HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(/\w[\w.-]*)?")


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
    from rewards.catalogue import RewardConfig

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
    kinds = get_args(get_args(RewardConfig)[0])
    facts += [(f"reward {kind.model_fields['kind'].default}", readiness(kind)) for kind in kinds]
    return facts, wrong


def readiness(kind: type[RewardSettings]) -> str:
    """Whether a reward can run here with its defaults, and what to do where it cannot."""
    from pydantic import ValidationError

    from rewards.environment import missing as missing_environment

    gpus, problem = kind.model_fields["gpus"].default, None
    if gpus > gpu_count():
        problem = f"it takes {gpus:g} GPUs and this machine has {gpu_count()}"
    try:
        settings = kind()
    except ValidationError as error:
        fields = {str(part) for line in error.errors() for part in line["loc"][:1]}
        needed = f"needs {', '.join(sorted(fields)) or 'options'} in the recipe"
        if kind.environment is not None:
            problem = missing_environment(kind.environment) or problem
        return needed if problem is None else f"not here: {problem}; {needed}"
    problem = settings.problem() or problem
    if problem is not None:
        return f"not here: {problem}"
    absent = [name for name in hub_names(settings) if not is_cached(name)]
    return f"ready; fetched from the hub at first: {', '.join(absent)}" if absent else "ready"


def hub_names(settings: RewardSettings) -> list[str]:
    """Repositories (owner/name) that fields name which may have one, as their descriptions say."""
    names: list[str] = []
    for field, described in type(settings).model_fields.items():
        value = settings.model_dump(include={field})[field]
        if isinstance(value, str) and "hub" in (described.description or ""):
            found = HUB_NAME.fullmatch(value)
            if found and not Path(value).exists():
                names.append(found[1])
    return list(dict.fromkeys(names))


def is_cached(repository: str) -> bool:
    """Whether anything of a hub's repository lies in the local cache."""
    from huggingface_hub.constants import HF_HUB_CACHE, REPO_ID_SEPARATOR

    folder = REPO_ID_SEPARATOR.join(["models", *repository.split("/")])
    return any(Path(HF_HUB_CACHE, folder).glob("snapshots/*/*"))
