"""Where what can be made again is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``CCPO_CACHE``, or ``~/.cache/ccpo``."""
    return Path(os.environ.get("CCPO_CACHE") or Path.home() / ".cache" / "ccpo")
