"""How the API's objects look on a terminal: tables, single lines, and JSON for programs.

Owns: layout and number formats. Builds rich renderables from `shared.schemas.responses`. Must not call the API.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence

import openai
from pydantic import BaseModel
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from shared.schemas.memory import PredictedPeak
from shared.schemas.requests import State
from shared.schemas.responses import Event, File, Job, Model
from shared.schemas.results import (
    DataReport,
    Export,
    JobError,
    LengthBucket,
    LossChange,
    Majority,
    Plan,
    Proof,
    Report,
    Verdict,
)

_STYLES = {
    State.SUCCEEDED: "green",
    State.FAILED: "red",
    State.CANCELLED: "yellow",
    State.PAUSED: "yellow",
    State.RUNNING: "cyan",
}
_VERDICTS = {Verdict.BETTER: "green", Verdict.SAME: "yellow", Verdict.WORSE: "red", Verdict.UNKNOWN: "yellow"}
#: The most labels that a plan lists.
_LABELS = 12
_BARS = " ▁▂▃▄▅▆▇█"
_LEVELS = {"info": "", "warn": "yellow", "error": "red"}


def console(*, stderr: bool = False) -> Console:
    """Markup is off, because file names and model output may look like it. A pipe gets wide lines, to cut no id."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else shutil.get_terminal_size((200, 50)).columns
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False, width=width)


def print_json(wire: BaseModel | dict[str, object]) -> None:
    """The API's object, or one of ours, as one JSON document."""
    if isinstance(wire, openai.BaseModel):
        wire = wire.to_dict()
    value = wire.model_dump(mode="json") if isinstance(wire, BaseModel) else wire
    print(json.dumps(value, indent=2, ensure_ascii=False))


# ---------------------------------------------------------------- lists


def models(items: Sequence[Model]) -> Table:
    table = _table("model", "kind", "parameters", "size", "licence", "from")
    for item in items:
        kind = "adapter" if item.base else "base"
        source = item.base or " @ ".join(part for part in (item.public_id, (item.revision or "")[:12]) if part)
        table.add_row(item.id, kind, _count(item.parameters), size(item.bytes), item.license or "", source)
    return table


def files(items: Sequence[File]) -> Table:
    table = _table("file", "name", "purpose", "size", "rows", "status", "created")
    for item in items:
        rows = f"{item.report.rows:,}" if item.report else ""
        status = Text(item.status, style="red" if item.status == "error" else "")
        table.add_row(item.id, item.filename, item.purpose, size(item.bytes), rows, status, _when(item.created_at))
    return table


def jobs(items: Sequence[Job]) -> Table:
    table = _table("job", "status", "model", "suffix", "progress", "held-out loss", "created")
    for job in items:
        step = f"{job.progress.step}/{job.progress.total_steps}" if job.progress else ""
        loss = f"{job.report.base.loss:.3f} → {job.report.tuned.loss:.3f}" if job.report else ""
        table.add_row(job.id, status(job), job.model, job.suffix or "", step, loss, _when(job.created_at))
    return table


def problems(file: File) -> RenderableType:
    """The rows of a dataset that cannot be trained on: the line, the problem, and what is allowed."""
    report = file.report
    if report is None:
        return Text(f"{file.filename}: {file.status_details or 'cannot be read'}", style="red")
    table = _table("line", "field", "problem", "allowed")
    for problem in report.problems:
        table.add_row(str(problem.line), problem.field, problem.message, problem.hint)
    head = f"{file.filename}: {report.bad_rows:,} of {report.rows + report.bad_rows:,} rows cannot be trained on"
    more = report.bad_rows - len(report.problems)
    return Group(Text(head, style="red"), table, *([Text(f"and {more:,} more")] if more else []))


# ---------------------------------------------------------------- one job


def job(item: Job) -> RenderableType:
    """Everything about a job, in the order in which it happened."""
    grid = facts()
    grid.add_row("job", item.id)
    grid.add_row("status", status(item))
    if item.reason:
        grid.add_row("reason", item.reason)
    if item.queue_position is not None:
        grid.add_row("queue", f"position {item.queue_position}")
    grid.add_row("model", item.model)
    if item.from_checkpoint:
        grid.add_row("starts from", item.from_checkpoint)
    grid.add_row("data", " + ".join(part for part in (item.training_file, item.validation_file) if part))
    grid.add_row("created", _when(item.created_at) + (f", attempt {item.attempt}" if item.attempt > 1 else ""))
    if item.metadata:
        grid.add_row("metadata", ", ".join(f"{key}={value}" for key, value in item.metadata.items()))
    if item.progress:
        grid.add_row("progress", progress(item))
    parts: list[RenderableType] = [grid]
    if item.plan:
        parts += [Text("\nplan", style="bold"), plan(item.plan)]
    return Group(*parts, outcome(item))


def outcome(item: Job) -> RenderableType:
    """The scores of base and tuned model and where the adapter is, or why the job failed."""
    parts: list[RenderableType] = []
    if item.report:
        more = Text(f"samples and costs: milliner report {item.id}", style="dim")
        parts += [Text("\nresult", style="bold"), report(item.report), more]
    if item.adapter:
        adapter = facts()
        adapter.add_row("adapter", f"{item.adapter.uri} ({size(item.adapter.bytes)})")
        adapter.add_row("name", item.fine_tuned_model or "")
        if item.adapter.proof:
            adapter.add_row("proof", proof(item.adapter.proof))
        for export in item.adapter.exports:
            adapter.add_row("export", exported(export))
        adapter.add_row("signed by", item.adapter.signed_by or "nobody")
        adapter.add_row("download", f"milliner pull {item.id} DIR")
        parts.append(adapter)
    if item.error:
        parts.append(failure(item.error))
    return Group(*parts)


def plan(item: Plan) -> RenderableType:
    """What training will do. The numbers are counted, not estimated."""
    recipe, grid = item.recipe, facts()
    held = f", {item.heldout_rows:,} of them held out" if item.heldout_rows else ""
    grid.add_row("rows", f"{item.rows:,}{held}")
    grid.add_row("tokens", f"{item.tokens:,}, {item.trained_tokens:,} trained per epoch; longest {item.longest_row:,}")
    if item.data is not None:
        _add_data(grid, item.data)
    grid.add_row("steps", f"{recipe.total_steps:,}: {recipe.n_epochs} epoch{'s' * (recipe.n_epochs != 1)}")
    grid.add_row("batch", f"{recipe.batch_size} rows per step{', packed' if recipe.packing else ''}")
    plus = f" ({recipe.loraplus_lr_ratio:g} times that for B)" if recipe.loraplus_lr_ratio else ""
    grid.add_row("rate", f"{recipe.learning_rate:.2e}{plus}, {recipe.schedule}, {recipe.warmup_steps} steps of warm-up")
    rank = f"{recipe.r} (alpha {recipe.alpha:g}, dropout {recipe.dropout:g})"
    grid.add_row("rank", "none: all weights are trained" if recipe.full_finetuning else rank)
    if recipe.beta is not None:
        grid.add_row("method", f"{recipe.method}, beta {recipe.beta:g}")
    if recipe.labels is not None:
        grid.add_row("method", f"{recipe.method}, {len(recipe.labels)} labels")
    grid.add_row("base", f"{recipe.quantization}, rows up to {recipe.max_length:,} tokens")
    if item.fit is not None:
        grid.add_row("memory", "; ".join(map(_peak, item.fit.peaks)))
    return Group(grid, *(Text(f"! {warning}", style="yellow") for warning in item.warnings))


def _peak(item: PredictedPeak) -> str:
    """`about 5.2 GB of the 24.0 GB of an NVIDIA A10`, or the kind of device if none is known."""
    if item.name is None:
        return f"about {size(item.predicted_bytes)} on a {'GPU' if item.kind == 'cuda' else 'CPU'}"
    return f"about {size(item.predicted_bytes)} of the {size(item.memory_bytes)} of {item.name}"


def _add_data(grid: Table, item: DataReport) -> None:
    """What was found in the training file. Counts of zero are left out."""
    template = f", chat template {item.chat_template_sha256[:12]}" if item.chat_template_sha256 else ""
    grid.add_row("format", f"{item.format}{template}")
    middle = f"median {item.length_p50:,}, 95 % up to {item.length_p95:,}, longest {item.length_max:,}"
    grid.add_row("lengths", f"{_bars(item.lengths)}  {middle}")
    if item.labels:
        named = ", ".join(f"{one.label!r} {one.rows:,}" for one in item.labels[:_LABELS])
        grid.add_row(
            "labels", named + (f" and {len(item.labels) - _LABELS} more" if len(item.labels) > _LABELS else "")
        )
    else:
        end = item.stop_token or "stop token"
        grid.add_row("stop", f"{item.stop_rows:,} of {item.rows:,} rows end in a trained {end}")
    lost = {
        "cut": item.truncated_rows,
        "dropped": item.dropped_rows,
        "skipped as bad": item.bad_rows,
        "repeat an earlier row": item.duplicate_rows,
        "held out and trained": item.heldout_overlap_rows,
        "begin with two BOS": item.double_bos_rows,
    }
    if any(lost.values()):
        grid.add_row("among them", ", ".join(f"{count:,} {what}" for what, count in lost.items() if count))


def _bars(buckets: Sequence[LengthBucket]) -> str:
    """`≤16 ▂  ≤32 █`: the fullest bucket has the full bar."""
    most = max(bucket.rows for bucket in buckets)
    return "  ".join(f"≤{bucket.upto:,} {_BARS[-(-bucket.rows * (len(_BARS) - 1) // most)]}" for bucket in buckets)


def report(item: Report) -> RenderableType:
    """The scores in short; client/report.py shows the whole report."""
    spent = (
        f"{item.steps:,} steps, {item.trained_tokens:,} tokens in {duration(item.train_seconds)}; "
        f"{item.trainable_parameters:,} of {item.total_parameters:,} parameters trained"
    )
    return Group(scores(item), *verdicts(item), Text(spent))


def scores(item: Report) -> Table:
    """Scores of base, start and tuned model on the same held-out rows."""
    if item.majority is not None:
        return _label_scores(item, item.majority)
    third = "perplexity" if item.tuned.reward_accuracy is None else "reward accuracy"
    table = _table("", "held-out loss", third, "token accuracy", f"({item.base.tokens:,} tokens)")
    for name, score in (("base", item.base), ("start", item.start), ("tuned", item.tuned)):
        if score is None:
            continue
        gained = f"{score.perplexity:.4g}" if score.reward_accuracy is None else f"{score.reward_accuracy:.1%}"
        table.add_row(name, f"{score.loss:.4f}", gained, f"{score.token_accuracy:.1%}")
    return table


def _label_scores(item: Report, most: Majority) -> Table:
    """Scores of a classifier beside the majority label. The base mostly has an untrained head and scores by chance."""
    table = _table("", "held-out loss", "accuracy", "macro F1", f"({item.base.tokens:,} rows)")
    for name, score in (("base", item.base), ("tuned", item.tuned)):
        table.add_row(name, f"{score.loss:.4f}", f"{score.token_accuracy:.1%}", f"{score.macro_f1 or 0:.3f}")
    table.add_row(f"always {most.label!r}", "", f"{most.accuracy:.1%}", "")
    return table


def verdicts(item: Report) -> list[Text]:
    """The comparison with the base, and with the adapter that the job started from, if there is one."""
    unit = "token" if item.majority is None else "row"
    if item.start_change is None:
        return [verdict(item.change, unit)]
    return [verdict(item.change, unit, against="base"), verdict(item.start_change, unit, against="start")]


def verdict(change: LossChange, unit: str = "token", *, against: str | None = None) -> Text:
    """The verdict, the change of the loss, and its confidence interval."""
    verb = "fell" if change.loss < 0 else "rose"
    if change.low is None or change.high is None:
        sure = "one row gives no interval"
    else:
        sure = f"95 % interval of the change {change.low:+.4f} to {change.high:+.4f}"
        sure += ", which includes 0" if change.verdict is Verdict.SAME else ""
    word = (change.verdict.value, f"bold {_VERDICTS[change.verdict]}")
    comparison = f"against the {against}, " if against else ""
    how = f": the loss {verb} by {abs(change.loss):.4f} nats per {unit} ({sure})"
    return Text.assemble(comparison, word, how)


def proof(item: Proof) -> str:
    """The proof of the published files, in one line."""
    rank = item.vllm.max_lora_rank
    served = "vLLM serves it without further options" if rank is None else f"vLLM: --max-lora-rank {rank}"
    vllm = served if item.vllm.servable else "vLLM cannot serve it"
    reasons = f" ({'; '.join(item.vllm.reasons)})" if item.vllm.reasons else ""
    off = max(item.base_deviation, item.tuned_deviation)
    return (
        f"downloaded and reloaded, {item.tensors} tensors: "
        f"loss {item.base.loss:.4f} → {item.tuned.loss:.4f} reproduced (off by {off:.1g}); {vllm}{reasons}"
    )


def exported(item: Export) -> Text:
    """An export: its path and its difference from the adapter, or why it failed."""
    if item.error is not None:
        return Text(f"no {item.name}: {item.error}", style="yellow")
    text = f"{item.path} ({size(item.bytes)})"
    if item.loss is None or item.difference is None:
        return Text(f"{text}: bit-identical to the adapter")
    largest = f", logits by at most {item.max_logit_difference:.2g}" if item.max_logit_difference is not None else ""
    return Text(f"{text}: loss {item.loss:.4f}, {item.difference:+.4f} against the adapter{largest}")


def failure(error: JobError) -> Text:
    """Why a job failed, the last lines of the trainer's log, and what to do next."""
    step = f", step {error.step}" if error.step is not None else ""
    text = Text.assemble((f"failed: {error.message}", "red"), f" ({error.code}{step})")
    for line in error.last_log_lines:
        text.append(f"\n  {line}", style="dim")
    return text.append(f"\n→ {error.hint}", style="bold") if error.hint else text


# ---------------------------------------------------------------- single lines


def status(item: Job) -> Text:
    phase = f", {item.phase}" if item.phase and item.status in (State.RUNNING, State.VALIDATING) else ""
    return Text(f"{item.status}{phase}", style=_STYLES.get(item.status, ""))


def progress(item: Job, loss: float | None = None) -> str:
    """Step, loss, speed and time left, where known."""
    parts = []
    if item.queue_position is not None:
        parts.append(f"position {item.queue_position}")
    if item.progress is not None:
        parts.append(f"step {item.progress.step:,}/{item.progress.total_steps:,}")
    if loss is not None:
        parts.append(f"loss {loss:.3f}")
    if item.progress is not None and item.progress.tokens_per_second:
        parts.append(f"{item.progress.tokens_per_second:,.0f} tokens/s")
    if item.progress is not None and item.progress.eta_seconds is not None:
        parts.append(f"ETA {duration(item.progress.eta_seconds)}")
    return "  ".join(parts)


def event(item: Event) -> Text:
    clock = time.strftime("%H:%M:%S", time.localtime(item.created_at))
    return Text.assemble((clock, "dim"), "  ", (item.message, _LEVELS[item.level]))


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(number: int | None) -> str:
    if number is None:
        return ""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"


def facts() -> Table:
    """An empty grid of two columns: name and value."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _when(stamp: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(stamp))


def _count(number: int | None) -> str:
    if number is None:
        return ""
    return f"{number / 1e9:.1f} B" if number >= 1e9 else f"{number / 1e6:.0f} M" if number >= 1e6 else f"{number:,}"
