"""The exception that ends work when a stop is asked for."""

from __future__ import annotations


class Interrupted(Exception):
    """A stop was asked for while rows were being scored, continued or trained on."""
