"""Engines: what decodes."""

from ccpo.engines.base import Engine, make_engine

__all__ = ["Engine", "make_engine"]
