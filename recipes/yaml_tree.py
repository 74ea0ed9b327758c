"""YAML with positions: plain data, and for every key path where it was written.

Scalars follow YAML 1.2 (``1e-3`` is a number, ``no`` is a word), duplicate keys are mistakes, and a
document is bounded in size, depth and aliases.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from recipes.errors import Location, Problem, RecipeError

Key = tuple[str | int, ...]
MAX_BYTES = 1 << 20
MAX_NODES = 20_000
MAX_DEPTH = 30

_INT = re.compile(r"[-+]?[0-9]+$")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
_SPECIAL = {"null": None, "~": None, "": None, "true": True, "false": False}


@dataclass
class Tree:
    """Plain data with the location of every key path."""

    data: Any
    where: dict[Key, Location] = field(default_factory=dict[Key, Location])


def read_tree(path: Path) -> Tree:
    """The mapping in a YAML file.

    Raises:
        RecipeError: the file cannot be read, or is not one bounded YAML mapping.
    """
    start = Location(str(path))
    try:
        raw = path.read_bytes()
        text = raw[: MAX_BYTES + 1].decode("utf-8")
    except IsADirectoryError:
        raise RecipeError([Problem(start, "", "is a directory, not a recipe file")]) from None
    except FileNotFoundError:
        raise RecipeError([Problem(start, "", "no such recipe; see 'rectify recipes'")]) from None
    except (OSError, ValueError) as error:
        raise RecipeError([Problem(start, "", f"cannot be read: {error}")]) from error
    if len(raw) > MAX_BYTES:
        raise RecipeError([Problem(start, "", f"is larger than {MAX_BYTES} bytes")])
    tree = parse_tree(text, str(path))
    if not isinstance(tree.data, dict):
        found = "nothing" if tree.data is None else type(tree.data).__name__
        raise RecipeError(
            [
                Problem(
                    Location(str(path), 1, 1),
                    "",
                    f"a recipe is a mapping of keys to values; found {found}",
                )
            ]
        )
    return tree


def parse_tree(text: str, source: str) -> Tree:
    """Plain data of YAML text; locations are in ``source``."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Location(source, mark.line + 1, mark.column + 1) if mark else Location(source, 1, 1)
        raise RecipeError([Problem(place, "", f"not YAML: {error.problem or error}")]) from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        message = str(error).splitlines()[0] if str(error) else "nested too deeply"
        raise RecipeError([Problem(Location(source, 1, 1), "", f"not YAML: {message}")]) from error
    builder = _Builder(source)
    data = builder.build(node, ()) if node is not None else None
    return Tree(data, builder.where)


class _Builder:
    def __init__(self, source: str) -> None:
        self.source = source
        self.where: dict[Key, Location] = {}
        self.nodes = 0

    def build(self, node: Node, key: Key) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES or len(key) > MAX_DEPTH:
            raise self._error(
                node, key, "is too large: nested or aliased beyond what a recipe needs"
            )
        self.where.setdefault(key, self._place(node))
        if isinstance(node, MappingNode):
            return self._mapping(node, key)
        if isinstance(node, SequenceNode):
            return [self.build(child, (*key, i)) for i, child in enumerate(node.value)]
        assert isinstance(node, ScalarNode)
        return self._scalar(node, key)

    def _mapping(self, node: MappingNode, key: Key) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name_node, child in node.value:
            name = name_node.value
            if not isinstance(name_node, ScalarNode) or not isinstance(name, str):
                raise self._error(name_node, key, "a key must be a plain word")
            path = (*key, name)
            if name in result:
                raise self._error(name_node, path, f"written twice; first at {self.where[path]}")
            self.where[path] = self._place(name_node)
            result[name] = self.build(child, path)
        return result

    def _scalar(self, node: ScalarNode, key: Key) -> Any:
        text: str = node.value
        if not re.fullmatch(r"tag:yaml\.org,2002:\w+", node.tag):
            raise self._error(node, key, f"the tag {node.tag!r} is not allowed")
        if node.style is not None:
            return text
        if text in _SPECIAL:
            return _SPECIAL[text]
        if _INT.match(text) and len(text) < 20:
            return int(text)
        if _FLOAT.match(text):
            value = float(text)
            if value in (float("inf"), float("-inf")):
                raise self._error(node, key, f"{text} is out of range")
            return value
        return text

    def _place(self, node: Node) -> Location:
        mark = node.start_mark
        return Location(self.source, mark.line + 1, mark.column + 1)

    def _error(self, node: Node, key: Key, message: str) -> RecipeError:
        return RecipeError([Problem(self._place(node), dotted(key), message)])


def dotted(key: Key) -> str:
    """``rl.pool.0`` for a key path."""
    return ".".join(map(str, key))
