"""A reward from anywhere: a dotted path or an entry point, e.g. a TRL reward function unchanged."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from importlib import metadata
from typing import Any, Literal, cast

from pydantic import Field

from rewards.contract import RewardFunction, RewardSettings

ENTRY_POINTS = "rectify.rewards"


class FunctionReward(RewardSettings, frozen=True, extra="forbid"):
    """A function of TRL's signature by name."""

    kind: Literal["function"] = "function"
    path: str = Field(
        description="package.module:attribute, or the name of an entry point in rectify.rewards."
    )
    arguments: dict[str, Any] = Field(
        default={},
        description="Keyword arguments: a class is made with them, a function called with them.",
    )

    def build(self) -> RewardFunction:
        """Import and bind.

        Raises:
            ValueError: nothing callable is there.
        """
        target = self._load()
        if inspect.isclass(target):
            target = target(**self.arguments)
        elif self.arguments:
            target = functools.partial(target, **self.arguments)
        if not callable(target):
            raise ValueError(f"reward {self.path!r} is not callable")
        return cast(RewardFunction, target)

    def problem(self) -> str | None:
        """Whether the name leads anywhere, without running the user's module."""
        if ":" not in self.path:
            names = sorted(e.name for e in metadata.entry_points(group=ENTRY_POINTS))
            if self.path in names:
                return None
            return (
                f"no entry point {self.path!r} in {ENTRY_POINTS} (there: {', '.join(names) or 'none'})"
                "; give package.module:attribute or install the package that declares it"
            )
        module = self.path.partition(":")[0]
        try:
            found = importlib.util.find_spec(module) is not None
        except (ImportError, ValueError):
            found = False
        if found:
            return None
        return f"module {module!r} is not importable here; install it or put it on PYTHONPATH"

    def _load(self) -> Any:
        if ":" not in self.path:
            (entry,) = metadata.entry_points(group=ENTRY_POINTS, name=self.path)
            return entry.load()
        module, _, attribute = self.path.partition(":")
        target: Any = importlib.import_module(module)
        for part in attribute.split("."):
            if not hasattr(target, part):
                raise ValueError(f"{module} has no attribute {attribute!r}")
            target = getattr(target, part)
        return target
