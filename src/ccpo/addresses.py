"""What is wrong with an endpoint's address."""

from __future__ import annotations

import re
from urllib.parse import urlsplit


def check_url(url: str) -> str | None:
    """What is wrong with the address of an endpoint, in words that do not repeat it; None where nothing is."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "it is not an address"
    if parts.username is not None or parts.password is not None:
        return "it has a name or password in it; give the key in an environment variable (key_env)"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "it must begin with http:// or https:// and a host"
    if parts.query or parts.fragment:
        return (
            "it has a query or fragment; give the address up to /v1, and the key in an environment variable (key_env)"
        )
    if port == 0 or not re.fullmatch(r"[!-~]+", url):
        return "it is not an address"
    return None
