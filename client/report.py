"""`milliner report`: scores, samples and cost of a job, as text and tables.

Owns: the layout of the report. Must not print.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from client.show import duration, exported, scores, size, verdicts
from shared.schemas.results import Continuation, Export, Report, Sample

_SOURCES = {
    "validation_file": "the rows of the validation file",
    "training_file_carved": "rows held out of the training file",
    "training_file": "the training rows themselves",
}
_CONTROLS = dict.fromkeys({*range(32), *range(127, 160)} - {9, 10}, "\N{REPLACEMENT CHARACTER}")


def document(item: Report, exports: Sequence[Export] = ()) -> RenderableType:
    """The whole report: scores, samples, cost, exports."""
    measured = Text(f"measured on {_SOURCES[item.heldout_source]}: {item.change.rows:,} rows", style="dim")
    parts: list[RenderableType] = [scores(item), *verdicts(item), measured]
    parts += [Text(f"! {caveat}", style="yellow") for caveat in item.change.caveats]
    if item.samples:
        title = "samples at temperature 0" if item.majority is None else "samples"
        parts += [Text(f"\n{title}", style="bold"), *map(_sample, item.samples)]
    parts += [Text("\ncost", style="bold"), _cost(item)]
    if exports:
        parts += [Text("\nexports", style="bold"), *map(exported, exports)]
    return Group(*parts)


def _sample(item: Sample) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(f"line {item.line:,}", _plain(item.prompt))
    table.add_row("reference", _plain(item.reference))
    table.add_row("base", _written(item.base))
    table.add_row("tuned", _written(item.tuned), end_section=True)
    return table


def _written(item: Continuation) -> Text:
    return Text.assemble(_plain(item.text), "" if item.ended else (" …", "dim"))


def _plain(text: str) -> str:
    """Text of a dataset or a model without control characters, which could control the terminal."""
    return text.translate(_CONTROLS)


def _cost(item: Report) -> Table:
    """What this job used, beside what full fine-tuning would need. The latter is computed, not measured."""
    full, base_parameters = item.full_finetuning, item.base_fp32_bytes // 4
    share = item.trainable_parameters / item.total_parameters
    table = Table(box=None, pad_edge=False, header_style="bold")
    measured = "all weights, measured" if share == 1 else "this adapter, measured"
    for column in ("", measured, "full fine-tuning in fp32, computed"):
        table.add_column(column, overflow="fold")
    table.add_row("trained", f"{item.trainable_parameters:,} parameters ({share:.2%})", f"{base_parameters:,}")
    table.add_row("on disk", f"{size(item.adapter_bytes)}", f"{size(full.weights_bytes)}")
    frozen = f"{size(item.base_bytes)} in {item.quantization}"
    table.add_row("base in memory", frozen, f"{size(item.base_fp32_bytes)}")
    state = f"{size(full.total_bytes)} for weights, gradients and AdamW alone"
    table.add_row("peak memory", f"{size(item.peak_memory_bytes)} in total", state)
    if item.fit is not None:
        off = item.fit.measured_bytes / item.fit.predicted_bytes - 1
        predicted = f"{size(item.fit.measured_bytes)} on {item.fit.device.name}"
        table.add_row("on the device", f"{predicted}; predicted {size(item.fit.predicted_bytes)} ({off:+.1%})", "")
    speed = f"{item.trained_tokens:,} tokens, {item.tokens_per_second:,.0f} per second"
    kept = f" (the adapter is from step {item.kept_step:,})" if item.kept_step not in (None, item.steps) else ""
    table.add_row("time", f"{duration(item.train_seconds)} for {item.steps:,} steps{kept}: {speed}", "")
    return table
