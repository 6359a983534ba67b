"""`milliner preview`: ask the server for rows as tokens, and show them.

Owns: how a token looks: trained or not, special or not, and control characters as symbols. Must not print.
"""

from __future__ import annotations

import openai
from openai import OpenAI
from rich.console import Group, RenderableType
from rich.text import Text

from client.request import Body
from client.upload import uploaded
from shared.schemas.preview import PreviewOut, PreviewRow, Segment
from shared.schemas.results import RowProblem

TRAINED, SPECIAL = "green", "magenta"
#: Around trained text where there is no colour.
OPEN, CLOSE = "⟦", "⟧"
NEWLINE, TAB = "↵", "⇥"
#: Control characters → symbols. A newline is shown as its symbol and still ends the line.
PICTURES = {code: 0x2400 + code for code in range(32)} | {
    ord("\n"): f"{NEWLINE}\n",
    ord("\t"): TAB,
    0x7F: "␡",
    **dict.fromkeys(range(128, 160), "�"),
}
#: Requests before giving up. The worker continues with a large file between them.
ATTEMPTS = 5


def ask(client: OpenAI, body: Body) -> PreviewOut:
    """The server's answer. `training_file` is an id, or a path that is uploaded and deleted again."""
    with uploaded(client, body["training_file"]) as file_id:
        body = body | {"training_file": file_id}
        for _ in range(ATTEMPTS - 1):
            try:
                return _asked(client, body)
            except openai.InternalServerError as error:
                if error.code != "preview_unfinished":
                    raise
        return _asked(client, body)


def rows(item: PreviewOut, *, colour: bool) -> RenderableType:
    """Each row under its line number, then the problems, then a legend."""
    parts: list[RenderableType] = []
    for row in item.rows:
        parts += [_head(row), _body(row, colour=colour), Text()]
    parts += [_problem(problem) for problem in item.problems]
    return Group(*parts, _legend(item, colour=colour))


def _head(row: PreviewRow) -> Text:
    left = sum(len(segment.ids) for segment in row.segments)
    answer = f", {row.answer}" if row.answer else ""
    what = f"{row.trained_tokens:,} trained" if row.label is None else f"label {row.label!r}"
    text = Text(f"line {row.line}{answer}: {row.tokens:,} tokens, {what}", style="bold")
    if row.truncated:
        text.append(f", cut after {left:,}", style="yellow")
    if not row.trained_tokens and row.label is None:
        text.append(", dropped: nothing trained is left", style="red")
    return text


def _body(row: PreviewRow, *, colour: bool) -> Text:
    text = Text()
    for segment in row.segments:
        text.append(_seen(segment, colour=colour), style=_style(segment) if colour else "")
    text.rstrip()  # the symbol of the last newline is enough
    if row.truncated:
        text.append(f" ✂ {row.tokens - sum(len(segment.ids) for segment in row.segments):,} tokens", style="yellow")
    # A closing bracket followed by an opening one has no meaning.
    return text if colour else Text(text.plain.replace(CLOSE + OPEN, ""))


def _seen(segment: Segment, *, colour: bool) -> str:
    text = segment.text.translate(PICTURES)
    return f"{OPEN}{text}{CLOSE}" if segment.trained and not colour else text


def _style(segment: Segment) -> str:
    weight = "bold " if segment.trained else "dim " if not segment.special else ""
    return weight + (SPECIAL if segment.special else TRAINED if segment.trained else "")


def _problem(problem: RowProblem) -> Text:
    where = f"{problem.field}: " if problem.field else ""
    return Text.assemble((f"line {problem.line}: {where}{problem.message}", "red"), f" (allowed: {problem.hint})")


def _legend(item: PreviewOut, *, colour: bool) -> Text:
    trained = Text("trained", style=f"bold {TRAINED}") if colour else Text(f"{OPEN}trained{CLOSE}")
    special = Text("special", style=SPECIAL) if colour else Text("<special>")
    parts = [trained, Text("not trained", style="dim" if colour else ""), special, Text(f"{NEWLINE} newline")]
    text = Text("  ").join(parts)
    facts = [f"{item.format} rows"] if item.format else []
    facts.append(f"cut at {item.max_length:,} tokens")
    if item.chat_template_sha256:
        facts.append(f"chat template {item.chat_template_sha256[:12]}")
    return text.append(f"\n{', '.join(facts)}", style="dim")


def _asked(client: OpenAI, body: Body) -> PreviewOut:
    """Send the request without the client's own retries, so that a missing worker is reported at once."""
    once = client.with_options(max_retries=0)
    return PreviewOut.model_validate(once.post("/fine_tuning/preview", cast_to=object, body=body))
