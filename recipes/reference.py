"""The recipe reference: every key with type, default and meaning, written from the schema itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from recipes.schema import KINDS


def reference(models: Sequence[type[BaseModel]]) -> str:
    """Markdown: a section for each kind of recipe and one for each config class they are made of."""
    pairs: Any = [(model, "validation") for model in models]
    parts = models_json_schema(pairs)[1]["$defs"]
    names = [model.__name__ for model in models]
    sections = [_section(name, parts[name]) for name in names]
    sections += [_section(name, part) for name, part in sorted(parts.items()) if name not in names]
    head = "# Recipe reference\n\nGenerated from the schema by `make docs`.\n\n"
    return head + "\n".join(sections)


def _section(name: str, schema: dict[str, Any]) -> str:
    intro = schema.get("description", "").splitlines()[0] if schema.get("description") else ""
    lines = [f"## {name}", "", intro, "", "| key | type | default | meaning |", "|---|---|---|---|"]
    required = schema.get("required", [])
    for key, field in schema.get("properties", {}).items():
        default = "required" if key in required else _default(field)
        lines.append(f"| `{key}` | {_type(field)} | {default} | {field.get('description', '')} |")
    return "\n".join(lines) + "\n"


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        name = field["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    options = field.get("anyOf") or field.get("oneOf")
    if options:
        return " or ".join(_type(option) for option in options)
    if field.get("type") == "array" and "items" in field:
        return f"list of {_type(field['items'])}"
    return str(field.get("type", "any"))


def _default(field: dict[str, Any]) -> str:
    default = field.get("default")
    if isinstance(default, dict):
        return "its defaults"
    return f"`{json.dumps(default)}`"


if __name__ == "__main__":
    sys.stdout.write(reference(list(KINDS.values())[::-1]))
