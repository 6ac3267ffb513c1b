"""One file with everything in it: markup, style, script and data. Nothing is fetched, and nothing in the data can run.

Data stands in blocks that are no script, with every character escaped that could end one; the page's policy allows only
its own script and style, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

STYLES = ("base", "parts", "charts", "rollouts", "print")
SCRIPTS = (
    "dom",
    "format",
    "text",
    "math_symbols",
    "math_parser",
    "scale",
    "linechart",
    "plots",
    "overview",
    "learning",
    "free_riding",
    "credit",
    "team",
    "table",
    "filters",
    "list",
    "detail",
    "compare",
    "main",
)
_UNSAFE = re.compile("[<>&\u2028\u2029]")


def page(document: Mapping[str, Any] | None, tables: Sequence[Mapping[str, Any]] = (), *, live: bool = False) -> str:
    """The HTML. ``live``: a page that fetches ``data.json`` from where it came from, and again when that changes."""
    blocks = [] if document is None else [_block("document", document)]
    blocks += [_block(f"rollouts-{i}", table) for i, table in enumerate(tables)]
    parts = {
        "policy": policy(live=live),
        "style": style(),
        "script": script(),
        "data": "\n".join(blocks),
        "mode": "live" if live else "file",
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("page.html"))


def policy(*, live: bool = False) -> str:
    """The content security policy: this script and this style, nothing else."""
    allowed = ["default-src 'none'", f"script-src '{_hash(script())}'", f"style-src '{_hash(style())}'"]
    return "; ".join([*allowed, *(["connect-src 'self'"] if live else []), "base-uri 'none'", "form-action 'none'"])


def to_json(data: Any) -> str:
    """JSON that may stand inside a script element. Lone surrogates stay escaped; a number that is not finite raises ValueError."""
    written = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    written = written.encode("utf-8", "backslashreplace").decode("utf-8")
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", written)


def _block(name: str, data: Any) -> str:
    return f'<script type="application/json" id="{name}">{to_json(data)}</script>'


@cache
def style() -> str:
    return "\n" + "\n".join(_asset(f"{name}.css") for name in STYLES)


@cache
def script() -> str:
    """The scripts in one function, so that they share names with each other and with nobody else."""
    return '\n(() => {\n"use strict";\n' + "\n".join(_asset(f"{name}.js") for name in SCRIPTS) + "\n})();\n"


@cache
def _asset(name: str) -> str:
    return (files("ccpo.report") / "assets" / name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
