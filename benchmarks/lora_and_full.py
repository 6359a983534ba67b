"""Compare a LoRA with full fine-tuning on the same machine, base, rows and steps: `python -m benchmarks.lora_and_full`.

Owns: the comparison and its table. Each run is the real trainer child in its own process, driven as in `train.py`, at
the learning rate that `auto` chooses. Losses come from its report, on the same held-out rows. The base is unquantized.
Writes lora_and_full.json and lora_and_full.md. --quick runs a few steps, on any base.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.train import ROOT, SEED, bundled, quote_rows, run_ours
from shared.schemas.requests import Lora, Method, Quantization, TrainerParams
from shared.schemas.results import Report
from worker.trainer.protocol import Task

STEPS, BATCH, HELDOUT = 60, 16, 200
WEIGHTS = ("adapter_model.safetensors", "model.safetensors")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.lora_and_full", description=__doc__)
    parser.add_argument("--base", type=Path, help="a base's folder (default: the bundled SmolLM2-135M-Instruct)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--quick", action="store_true", help="run two steps of four rows, as a smoke test")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="milliner-bench-") as scratch:
        found = compare(Path(scratch), base=args.base, quick=args.quick)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "lora_and_full.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = table(found)
    (args.out / "lora_and_full.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def compare(scratch: Path, *, base: Path | None, quick: bool) -> dict[str, Any]:
    """Train both; the content of lora_and_full.json."""
    steps, batch, heldout = (2, 4, 4) if quick else (STEPS, BATCH, HELDOUT)
    about_machine = machine.describe()
    base = base or bundled(scratch / "base")
    train, validation = quote_rows(scratch, steps * batch, heldout)
    runs = {}
    for name, full in (("LoRA", False), ("full fine-tuning", True)):
        task = Task(
            base_dir=str(base),
            base_name=base.name,
            base_revision="0" * 40,
            training_file=str(train),
            validation_file=str(validation),
            method=Method.of("supervised", n_epochs=1, batch_size=batch),
            lora=Lora(),
            quantization=Quantization.NONE,
            trainer=TrainerParams(max_steps=steps, full_finetuning=full),
            seed=SEED,
            max_row_bytes=1 << 20,
        )
        result, recipe = run_ours(task, scratch / name.partition(" ")[0])
        folder = Path(result.adapter)
        report = Report.model_validate_json((folder / "report.json").read_text(encoding="utf-8"))
        runs[name] = {
            "learning_rate": recipe.learning_rate,
            "r": recipe.r,
            "steps": result.steps,
            "trained_tokens": result.trained_tokens,
            "base_loss": report.base.loss,
            "loss": report.tuned.loss,
            "loss_low": report.change.low,
            "loss_high": report.change.high,
            "trainable_parameters": report.trainable_parameters,
            "total_parameters": report.total_parameters,
            "seconds": result.seconds,
            "peak_bytes": result.peak_bytes,
            "published_bytes": sum((folder / file).stat().st_size for file in WEIGHTS if (folder / file).exists()),
        }
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python -m benchmarks.lora_and_full --quick" if quick else "make bench-full",
        "machine": about_machine,
        "versions": machine.versions(),
        "base": base.name,
        "heldout_rows": heldout,
        "runs": runs,
    }


def table(found: dict[str, Any]) -> str:
    """The results as Markdown: one line per run, then the LoRA's share of full fine-tuning's gain and cost."""
    about, runs = found["machine"], found["runs"]
    lora, full = runs.values()
    packages = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    lines = [
        f"`{found['command']}` on {found['date']}: {about['cpu']}, {about['cores']} cores "
        f"({', '.join(about['flags'])}), load {about['load_before']} before; {packages}.",
        f"{found['base']}, not quantized; {lora['steps']} steps on the same {lora['trained_tokens']:,} tokens, each at "
        f"its own rate; the base alone has a loss of {lora['base_loss']:.4f} on {found['heldout_rows']} held-out rows.",
        "",
        "| | parameters trained | rate | held-out loss | seconds in steps | peak RSS | weights to keep |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        share = run["trainable_parameters"] / run["total_parameters"]
        cells = (
            name,
            f"{run['trainable_parameters']:,} ({share:.2%})",
            f"{run['learning_rate']:.2e}",
            f"{run['loss']:.4f}",
            f"{run['seconds']:.1f}",
            f"{run['peak_bytes'] / 1e9:.2f} GB",
            f"{run['published_bytes'] / 1e6:,.1f} MB",
        )
        lines.append(f"| {' | '.join(cells)} |")
    gained = (lora["base_loss"] - lora["loss"]) / (full["base_loss"] - full["loss"])
    lines += [
        "",
        f"The LoRA gained {gained:.0%} of what full fine-tuning did, in {lora['seconds'] / full['seconds']:.2f} of its "
        f"time and {lora['peak_bytes'] / full['peak_bytes']:.2f} of its memory; its published weights are "
        f"{lora['published_bytes'] / full['published_bytes']:.1%} of the size.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
