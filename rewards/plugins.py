"""A reward from anywhere: a dotted path or an entry point, e.g. a TRL reward function unchanged."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from importlib.abc import SourceLoader
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field

from rewards.contract import DifferentiableReward, RewardFunction, RewardSettings

ENTRY_POINTS = "rectify.rewards"
# What TRL hands to every reward: a function that takes none of these makes one.
SAMPLE_ARGUMENTS = frozenset({"prompts", "completions", "completion_ids"})
# Ways in which a module gets names that its source does not spell out.
DYNAMIC_NAMES = re.compile(r"import \*|__getattr__|sys\.modules|(globals|vars|setattr|exec)\(")


class FunctionReward(RewardSettings, frozen=True, extra="forbid"):
    """A function of TRL's signature by name."""

    kind: Literal["function"] = "function"
    path: str = Field(
        description="package.module:attribute, package.module.attribute, or the name of an entry "
        "point in rectify.rewards."
    )
    arguments: dict[str, Any] = Field(
        default={},
        description="Keyword arguments: a class or factory is called with them once, a function "
        "each time.",
    )
    conversations: bool = Field(
        default=False,
        description="Prompts and completions are handed over as conversations of one turn, as TRL's "
        "own rewards want them; else as text.",
    )
    gradient: bool = Field(
        default=False,
        description="It has a method differentiable(prompts, pixels, **columns) that guidance follows.",
    )

    def has_gradient(self) -> bool:
        """As the recipe says."""
        return self.gradient

    def build(self) -> RewardFunction:
        """Import and bind.

        A factory is a function that takes neither prompts, completions, completion_ids nor
        ``**columns``, e.g. ``trl.rewards.get_soft_overlong_punishment``.

        Raises:
            ValueError: nothing callable is there, or no ``differentiable`` where one is promised.
        """
        target = self._load()
        if inspect.isclass(target) or _is_factory(target):
            target = target(**self.arguments)
        elif self.arguments:
            target = functools.partial(target, **self.arguments)
        if not callable(target):
            raise ValueError(f"reward {self.path!r} is not callable")
        if self.conversations:
            target = _conversational(target)
        if self.gradient and not isinstance(target, DifferentiableReward):
            raise ValueError(f"reward {self.path!r} has no method differentiable(prompts, pixels)")
        return cast(RewardFunction, target)

    def problem(self) -> str | None:
        """Whether the name leads anywhere, without running the module or the packages above it."""
        names = sorted({entry.name for entry in metadata.entry_points(group=ENTRY_POINTS)})
        if self.path in names:
            return None
        module, attribute = _split(self.path)
        if not module:
            there = f"there: {', '.join(names) or 'none'}{_nearest(self.path, names)}"
            return (
                f"no entry point {self.path!r} in {ENTRY_POINTS} ({there}); give "
                "package.module:attribute or install the package that declares it"
            )
        spec = find_module(module)
        if spec is None:
            hint = _nearest(module, _modules_beside(module))
            remedy = "install it or put it on PYTHONPATH"
            return f"module {module!r} is not importable here{hint}; {remedy}"
        return _missing(spec, attribute.partition(".")[0])

    def _load(self) -> Any:
        entries = tuple(metadata.entry_points(group=ENTRY_POINTS, name=self.path))
        if len(entries) > 1:
            owners = ", ".join(entry.value for entry in entries)
            raise ValueError(f"several packages declare a reward {self.path!r}: {owners}")
        if entries:
            return entries[0].load()
        module, attribute = _split(self.path)
        if not module:
            raise ValueError(self.problem())
        target: Any = importlib.import_module(module)
        for part in attribute.split("."):
            if not hasattr(target, part):
                raise ValueError(f"{module} has no attribute {attribute!r}")
            target = getattr(target, part)
        return target


def find_module(module: str) -> ModuleSpec | None:
    """The spec of a module; unlike ``importlib.util.find_spec`` it runs no package above it."""
    parent, _, name = module.rpartition(".")
    if not name.isidentifier():
        return None
    if not parent or module in sys.modules:
        try:
            return importlib.util.find_spec(module)
        except ValueError:  # loaded, but from nowhere: __main__
            return None
    places = _places(parent)
    try:
        return PathFinder.find_spec(module, places) if places else None
    except KeyError:  # a namespace package below one that is not imported
        return PathFinder.find_spec(name, places)


def _places(package: str) -> list[str]:
    """Directories of a package; none where it is no package."""
    spec = find_module(package)
    if spec is None or spec.submodule_search_locations is None:
        return []
    if spec.origin is not None:
        return list(spec.submodule_search_locations)
    # A namespace package that is not imported cannot tell its own places.
    parent, _, name = package.rpartition(".")
    above = _places(parent) if parent else sys.path
    return [str(place) for base in above if (place := Path(base or ".", name)).is_dir()]


def _split(path: str) -> tuple[str, str]:
    """Module and attribute; no module where the path can only be an entry point."""
    if ":" in path:
        module, _, attribute = path.partition(":")
    else:
        module, _, attribute = path.rpartition(".")
    return module, attribute


def _missing(spec: ModuleSpec, attribute: str) -> str | None:
    """Why a module has no such attribute, as far as its source tells; None where it may have."""
    if find_module(f"{spec.name}.{attribute}") is not None:
        return None
    source = spec.loader.get_source(spec.name) if isinstance(spec.loader, SourceLoader) else None
    if source is None or DYNAMIC_NAMES.search(source):
        return None
    if attribute in re.findall(r"\w+", source):
        return None
    defined = re.findall(r"^(?:async +)?(?:def|class) +(\w+)", source, re.MULTILINE)
    return (
        f"module {spec.name!r} has no attribute {attribute!r}{_nearest(attribute, defined)}; "
        "correct the name in path"
    )


def _modules_beside(module: str) -> list[str]:
    """Full names of the modules that are where a missing one should be."""
    parent = module.rpartition(".")[0]
    while parent and find_module(parent) is None:
        parent = parent.rpartition(".")[0]
    if not parent:
        return [found.name for found in pkgutil.iter_modules()]
    places = _places(parent)
    return [f"{parent}.{found.name}" for found in pkgutil.iter_modules(places)]


def _nearest(name: str, options: Iterable[str]) -> str:
    """A half-sentence that names the nearest option, or nothing."""
    close = difflib.get_close_matches(name, list(options), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _conversational(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of conversations as one of text, with the same signature."""
    roles = {"prompts": "user", "completions": "assistant"}

    @functools.wraps(function)
    def call(**given: Any) -> Any:
        for name in roles.keys() & given.keys():
            given[name] = [[{"role": roles[name], "content": text}] for text in given[name]]
        return function(**given)

    return call


def _is_factory(target: Any) -> bool:
    if not inspect.isroutine(target):
        return False
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # compiled code need not have a readable signature
        return False
    return not any(p.kind is p.VAR_KEYWORD or p.name in SAMPLE_ARGUMENTS for p in parameters)
