"""The exception that ends work when a stop is requested."""

from __future__ import annotations


class Interrupted(Exception):
    """A stop was requested while the model was training, scoring or generating."""
