"""What a terminal shows of a thing that rich draws."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType


def drawn(thing: RenderableType, width: int = 160) -> str:
    out = io.StringIO()
    Console(file=out, width=width, markup=False, highlight=False).print(thing)
    return out.getvalue()
