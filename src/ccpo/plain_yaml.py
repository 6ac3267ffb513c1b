"""YAML as recipes need it: safe, no key twice, ``1e-6`` a number, dates plain text, one kind of error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ccpo.errors import UserError


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """The mapping in a file. ``what``: "a recipe is a mapping of …". Raises UserError where it is not YAML, or not a mapping."""
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: {what}; found {type(data).__name__}")
    return data


def parse_yaml(text: str) -> Any:
    """The data in ``text``. Raises ``yaml.YAMLError``, whatever is wrong with it."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, TypeError, AttributeError) as error:  # PyYAML's, where a value does not fit the tag before it
        raise yaml.YAMLError(f"a value does not fit its tag: {error}") from None
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


class _Loader(yaml.SafeLoader):
    """Plain YAML 1.1 lets the last of two equal keys win, reads ``1e-6`` as text and ``2026-13-45`` as a date."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is a word, not a list or mapping", key_node.start_mark
                )
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?\d*(?:[eE][-+]?\d+)|\d[\d_]*\.\d*|\.\d+(?:[eE][-+]?\d+)?|\.inf|\.nan)$"),
    list("-+0123456789."),
)
