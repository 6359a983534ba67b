"""A preview as people read it: trained text is marked with and without colour; control characters are symbols."""

from __future__ import annotations

import io
from typing import Literal

from rich.console import Console

from client.preview import rows
from shared.schemas.preview import PreviewOut, PreviewRow, Segment
from shared.schemas.results import RowProblem


def segment(text: str, *, trained: bool = False, special: bool = False) -> Segment:
    return Segment(text=text, trained=trained, special=special, ids=[7] * len(text.split()))


ROW = PreviewRow(
    line=3,
    answer=None,
    tokens=9,
    trained_tokens=3,
    truncated=True,
    segments=[
        segment("<|user|>", special=True),
        segment("[bold]hat\x1b[31m?\n\ta"),
        segment("felt\n", trained=True),
        segment("<|end|>", trained=True, special=True),
        segment("\n"),
    ],
)
PREVIEW = PreviewOut(
    format="chat",
    max_length=5,
    chat_template_sha256="0123456789abcdef" * 4,
    rows=[ROW, ROW.model_copy(update={"line": 4, "trained_tokens": 0, "truncated": False})],
    problems=[RowProblem(line=5, field="messages", message="found []", hint="a non-empty array")],
)


def drawn(*, colour: bool) -> str:
    out = io.StringIO()
    system: Literal["standard"] | None = "standard" if colour else None
    console = Console(file=out, width=80, markup=False, highlight=False, force_terminal=colour, color_system=system)
    console.print(rows(PREVIEW, colour=colour), soft_wrap=True)
    return out.getvalue()


def test_without_colour_brackets_mark_what_is_trained() -> None:
    assert drawn(colour=False).splitlines()[:5] == [
        "line 3: 9 tokens, 3 trained, cut after 5",
        "<|user|>[bold]hat␛[31m?↵",
        "⇥a⟦felt↵",
        "<|end|>⟧↵ ✂ 4 tokens",
        "",
    ]


def test_in_colour_the_brackets_are_not_needed() -> None:
    text = drawn(colour=True)
    assert "⟦" not in text
    assert "\x1b[1;32mfelt↵" in text
    assert "\x1b[1;35m<|end|>" in text
    assert "\x1b[35m<|user|>" in text
    assert "␛[31m" in text


def test_problems_dropped_rows_and_a_legend_are_shown() -> None:
    text = drawn(colour=False)
    assert "line 4: 9 tokens, 0 trained, dropped: nothing trained is left" in text
    assert "line 5: messages: found [] (allowed: a non-empty array)" in text
    assert text.splitlines()[-2:] == [
        "⟦trained⟧  not trained  <special>  ↵ newline",
        "chat rows, cut at 5 tokens, chat template 0123456789ab",
    ]
