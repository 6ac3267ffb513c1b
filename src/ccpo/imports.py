"""Objects named in text as ``module:attribute``, for rules, teams, tasks and decision functions of the user's own."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from ccpo.errors import UserError, nearest


def load_object(path: str, where: str) -> Any:
    """The object at ``module:attribute``; modules are looked for in the current folder too. Raises UserError naming ``where``."""
    module_name, colon, attribute = str(path).partition(":")
    if not colon or not module_name or not attribute:
        raise UserError(f"{where}: found {path!r}; expected module:attribute, for example my_rules:MyRule")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"{where}: cannot import {module_name!r} ({error}); run from the folder it is in, or install it"
        ) from None
    if not hasattr(module, attribute):
        raise UserError(f"{where}: module {module_name!r} has no {attribute!r}.{nearest(attribute, dir(module))}")
    return getattr(module, attribute)
