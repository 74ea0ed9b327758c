"""From a recipe file to a validated object: ``extends``, overrides, and errors that name the place."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from pydantic_core import ErrorDetails

from recipes.errors import Location, Problem, RecipeError, nearest
from recipes.yaml_tree import Key, Tree, dotted, parse_tree, read_tree

M = TypeVar("M", bound=BaseModel)

PACKAGED = Path(__file__).parent


@dataclass(frozen=True)
class Loaded(Generic[M]):
    """A validated recipe and where each of its values was written."""

    value: M
    resolved: dict[str, Any]
    tree: Tree

    def problem(self, key: str, message: str) -> Problem:
        """A mistake at a dotted key, placed at the nearest part of it that was written."""
        path: Key = tuple(int(p) if p.isdigit() else p for p in key.split("."))
        return Problem(place(self.tree, path), key, message)


def load(
    path: Path, model: type[M] | Callable[[dict[str, Any]], type[M]], overrides: Sequence[str] = ()
) -> Loaded[M]:
    """Read, extend, override and validate a recipe.

    Args:
        path: a file, or the name of a packaged recipe (``digits/flash_grpo``).
        model: what it must be, or a function that tells from the document.
        overrides: ``key.path=value`` in YAML's scalar or flow syntax.

    Raises:
        RecipeError: with every mistake and its place.
    """
    tree = _extended(find(path), ())
    for override in overrides:
        _override(tree, override)
    kind: Any = model if isinstance(model, type) else model(tree.data)
    try:
        text = json.dumps(tree.data, allow_nan=False)
        value = kind.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise RecipeError(_problems(error, tree, kind)) from None
    return Loaded(value, tree.data, tree)


def find(path: Path) -> Path:
    """``path`` itself, or the packaged recipe of that name."""
    if path.exists():
        return path
    for candidate in (PACKAGED / path, PACKAGED / f"{path}.yaml"):
        if candidate.is_file() and PACKAGED in candidate.resolve().parents:
            return candidate
    names = {name: name for name in packaged()}
    message = f"no such recipe{nearest(str(path), names)}; 'rectify recipes' lists those included"
    raise RecipeError([Problem(Location(str(path)), "", message)])


def packaged() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(
        p.relative_to(PACKAGED).with_suffix("").as_posix() for p in PACKAGED.rglob("*.yaml")
    )


def place(tree: Tree, key: Key) -> Location:
    """Where ``key``, or the innermost part of it that exists, was written."""
    while key not in tree.where and key:
        key = key[:-1]
    return tree.where.get(key, Location("recipe"))


def _extended(path: Path, chain: tuple[Path, ...]) -> Tree:
    tree = read_tree(path)
    if "extends" not in tree.data:
        return tree
    at = tree.where[("extends",)]
    names = tree.data.pop("extends")
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        message = f"expected a file or a list of files, found {names!r}"
        raise RecipeError([Problem(at, "extends", message)])
    chain = (*chain, path.resolve())
    merged: Tree | None = None
    for name in names:
        parent = path.parent / name
        if not parent.exists():
            try:
                parent = find(Path(name))
            except RecipeError as error:
                raise RecipeError([Problem(at, "extends", error.problems[0].message)]) from None
        if parent.resolve() in chain:
            links = " -> ".join(p.name for p in (*chain, parent))
            raise RecipeError([Problem(at, "extends", f"goes round in a circle: {links}")])
        base = _extended(parent, chain)
        merged = base if merged is None else _merged(merged, base)
    return tree if merged is None else _merged(merged, tree)


def _merged(base: Tree, over: Tree) -> Tree:
    where = dict(base.where)
    data = _merge(base.data, over.data, (), where)
    return Tree(data, where | over.where)


def _merge(base: Any, over: Any, key: Key, where: dict[Key, Location]) -> Any:
    """Mappings merge; anything else, and a mapping of another ``kind``, replaces."""
    both = isinstance(base, dict) and isinstance(over, dict)
    if not both or ("kind" in over and over["kind"] != base.get("kind")):
        for stale in [k for k in where if k[: len(key)] == key and k != key]:
            del where[stale]
        return over
    result = dict(base)
    for name, value in over.items():
        path = (*key, name)
        result[name] = _merge(base[name], value, path, where) if name in base else value
    return result


def _override(tree: Tree, override: str) -> None:
    name, equals, text = override.partition("=")
    # Without the value, which may be long, and may hold what a message must not show.
    at = Location(f"--set {name}=..." if equals else f"--set {override}")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(
            [Problem(at, "", "expected key.path=value, for example rl.clip_range=1e-3")]
        )
    value = parse_tree(text, str(at)).data
    target = tree.data
    key: Key = ()
    for part in parts[:-1]:
        step: str | int = int(part) if isinstance(target, list) and part.isdigit() else part
        key = (*key, step)
        if isinstance(target, list):
            target = _element(target, step, at, dotted(key))
        elif isinstance(target, dict):
            if target.get(step) is None:
                target[step] = {}
                tree.where[key] = at
            target = target[step]
        else:
            raise RecipeError([Problem(at, dotted(key), f"{dotted(key[:-1])} has no parts")])
    _assign(tree, target, parts[-1], key, value, at)


def _element(target: list[Any], step: str | int, at: Location, key: str) -> Any:
    if not isinstance(step, int) or step >= len(target):
        raise RecipeError([Problem(at, key, f"expected an index below {len(target)}")])
    return target[step]


def _assign(tree: Tree, target: Any, last: str, key: Key, value: Any, at: Location) -> None:
    step: Any = int(last) if isinstance(target, list) and last.isdigit() else last
    if isinstance(target, list):
        _element(target, step, at, dotted((*key, step)))
    elif not isinstance(target, dict):
        raise RecipeError([Problem(at, dotted((*key, last)), f"{dotted(key)} has no parts")])
    path = (*key, step)
    for stale in [k for k in tree.where if k[: len(path)] == path]:
        del tree.where[stale]
    target[step] = value
    tree.where[path] = at


def _problems(error: ValidationError, tree: Tree, model: type[BaseModel]) -> list[Problem]:
    problems = [_problem(details, tree, model) for details in error.errors()]
    # A list whose element is wrong is also "too short": only the innermost mistake is the user's.
    return [p for p in problems if not any(q.key.startswith(f"{p.key}.") for q in problems)]


def _problem(details: ErrorDetails, tree: Tree, model: type[BaseModel]) -> Problem:
    key = _written(details["loc"], tree.data)
    context = details.get("ctx", {})
    found = details["input"]
    match details["type"]:
        case "extra_forbidden":
            allowed = sorted(_fields_at(model, tree.data, key[:-1]))
            name = str(key[-1])
            message = f"unknown key{nearest(name, allowed)}; allowed: {', '.join(allowed)}"
        case "missing":
            message = "is required and was not given"
        case "union_tag_invalid" | "union_tag_not_found" | "literal_error":
            expected = str(context.get("expected_tags", context.get("expected", "")))
            options = [w.strip(" '") for w in expected.replace(" or ", ", ").split(",") if w]
            if details["type"].startswith("union"):
                key = (*key, "kind")
                found = context.get("tag", "nothing")
            hint = nearest(str(found), options)
            message = f"found {found!r}{hint}; allowed: {', '.join(options) or 'a kind'}"
        case "value_error" | "recipe":
            message = str(context.get("error", details["msg"]))
        case _:
            message = f"{details['msg'][0].lower()}{details['msg'][1:]}; found {_short(found)}"
    return Problem(place(tree, key), dotted(key), message)


def _written(loc: tuple[int | str, ...], data: Any) -> Key:
    """The key path behind pydantic's, which also holds the tags of unions."""
    key: list[int | str] = []
    for position, part in enumerate(loc):
        inside, data = _step(data, part)
        tag = isinstance(data, dict) and data.get("kind", part) == part
        if inside or not (tag and position < len(loc) - 1):
            key.append(part)
    return tuple(key)


def _step(data: Any, part: int | str) -> tuple[bool, Any]:
    """Whether ``part`` is in ``data``, and what is there (else ``data`` itself)."""
    try:
        return True, data[part]
    except (KeyError, IndexError, TypeError):
        return False, data


def _fields_at(model: type[BaseModel], data: Any, key: Key) -> set[str]:
    """The fields that the schema allows in the mapping at ``key``."""
    schema = model.model_json_schema()
    node: Any = schema
    for part in (*key, None):
        node = _resolved(node, schema, data)
        if part is None:
            break
        node = (
            node.get("items", {})
            if isinstance(part, int)
            else node.get("properties", {}).get(part, {})
        )
        data = data[part]
    return set(node.get("properties", {})) | ({"extends"} if not key else set())


def _resolved(node: Any, schema: Any, data: Any) -> Any:
    """Follow references, and the branch of a union that ``data`` names by its kind."""
    while True:
        options = node.get("oneOf") or node.get("anyOf")
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
        elif "mapping" in node.get("discriminator", {}):
            mapping = node["discriminator"]["mapping"]
            kind = data.get("kind") if isinstance(data, dict) else None
            reference = mapping.get(kind, next(iter(mapping.values())))
            node = {"$ref": reference}
        elif options:
            node = next((o for o in options if o.get("type") != "null"), options[0])
        elif "allOf" in node:
            node = node["allOf"][0]
        else:
            return node


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def editor_schema(kinds: Mapping[str | None, type[BaseModel]]) -> dict[str, Any]:
    """The JSON schema that an editor completes and checks recipes with.

    ``kinds``: what a document with a key is, tried in order; None: any other.
    """
    pairs: Any = [(kind, "validation") for kind in kinds.values()]
    references, definitions = models_json_schema(pairs, ref_template="#/$defs/{model}")
    extends = {
        "description": "Recipe file(s) that this one starts from.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    for kind in kinds.values():
        schema = definitions["$defs"][kind.__name__]
        schema["properties"] = {"extends": extends, **schema["properties"]}
        schema.pop("required", None)  # a recipe that extends another may leave anything out
    chosen: dict[str, Any] = {}
    for key, kind in reversed(list(kinds.items())):
        reference = references[kind, "validation"]
        whole = {"if": {"required": [key]}, "then": reference, "else": chosen}
        chosen = reference if key is None else whole
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **chosen, **definitions}
