"""The OpenAPI description as one page that needs no network."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2


def api_page(description: Mapping[str, Any]) -> str:
    """HTML with every route, its fields and its errors."""
    source = (resources.files("ctrlray") / "assets" / "api.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    routes = [_route(path, method, o) for path, methods in description["paths"].items() for method, o in methods.items()]
    schemas = description.get("components", {}).get("schemas", {})
    shown = {name: _fields(schema) for name, schema in schemas.items() if "properties" in schema}
    return environment.from_string(source).render(info=description["info"], routes=routes, schemas=shown)


def _route(path: str, method: str, operation: Mapping[str, Any]) -> dict[str, Any]:
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    return {
        "method": method.upper(),
        "path": path,
        "about": operation.get("description", ""),
        "body": content.get("schema", {}).get("$ref", "").rpartition("/")[2],
        "errors": {s: r["description"] for s, r in operation["responses"].items() if s != "200"},
    }


def _fields(schema: Mapping[str, Any]) -> list[dict[str, Any]]:
    required = schema.get("required", [])
    return [
        {"name": name, "kind": _kind(p), "required": name in required, "about": p.get("description", "")}
        for name, p in schema["properties"].items()
    ]


def _kind(schema: Mapping[str, Any]) -> str:
    """`integer 1..128`, `ChatMessage list`, `"dial" or "rerank"`."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(_kind(o) for o in options))
    if "enum" in schema:
        return " or ".join(f'"{v}"' for v in schema["enum"])
    if "const" in schema:
        return f'"{schema["const"]}"'
    if schema.get("type") == "array":
        return f"{_kind(schema.get('items', {}))} list"
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    limits = f" {low}..{high}" if low is not None and high is not None else ""
    return str(schema.get("type", "any")) + limits
