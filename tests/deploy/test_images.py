"""The Dockerfiles install a part of what `make setup` installs, and copy only existing paths."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMAGES: dict[str, set[str]] = {"api": set(), "worker": {"worker", "trackers"}}


def installs(path: str) -> list[set[str]]:
    """Return the extras of each command that installs the checkout with the constraints."""
    command = r"pip install (?:-q )?-c constraints\.txt (?:-e )?'?\.(?:\[([\w,]+)\])?'?$"
    return [set(extras.split(",")) - {""} for extras in re.findall(command, (ROOT / path).read_text(), re.MULTILINE)]


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_installs_a_part_of_what_setup_does(image: str) -> None:
    [setup] = installs("Makefile")
    [extras] = installs(f"deploy/{image}.Dockerfile")
    assert extras == IMAGES[image]
    assert extras <= setup


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_copies_the_checkout_and_drops_root(image: str) -> None:
    text = (ROOT / f"deploy/{image}.Dockerfile").read_text()
    for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / source).exists() for source in line.split())
    assert "\nUSER milliner\n" in text
