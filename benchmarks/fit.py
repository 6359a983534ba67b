"""Compare predicted with measured peak memory on this machine: `python -m benchmarks.fit`.

Owns: the cases and the table. A case is two runs of the real trainer child (`prepare` and `train` in one process),
each a few steps of rows of similar length. The table has three errors of the prediction. "off before": uncorrected.
"off after": of the second run, corrected by the first. "off from others": of the first run, corrected by the other
cases. Writes fit.json and fit.md.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.train import ROOT, bundled, run_ours
from shared.estimation.correction import corrected
from shared.schemas.memory import MeasuredFit, Weighing
from shared.schemas.requests import Lora, Method, Quantization, TrainerParams
from shared.schemas.results import Report
from worker.trainer.protocol import Task

#: Rows of a step, steps, held-out rows, LoRA rank, seed.
BATCH, STEPS, HELDOUT, RANK, SEED = 32, 3, 2, 16, 7
WORDS = ["a", "felt", "hat", "with", "the", "brim", "of", "straw", "and", "silk", "ribbon", "for", "her", "head"]
#: The goal: the largest relative error of a prediction before and after the first run of a base on a machine.
BEFORE, AFTER = 0.05, 0.01


@dataclass(frozen=True, slots=True)
class Case:
    """A layout: up to `micro_batch` rows at a time. A row is one document of `words` words, or several if packed."""

    quantization: Quantization
    words: int
    micro_batch: int
    checkpointing: bool = False
    packing: bool = False

    @property
    def name(self) -> str:
        how = ", checkpointed" * self.checkpointing + ", packed" * self.packing
        return f"{self.quantization.value}, {self.micro_batch} rows{how}"


CASES = (
    Case(Quantization.NF4, 40, 16, packing=True),
    Case(Quantization.NF4, 120, 4),
    Case(Quantization.NF4, 120, 16),
    Case(Quantization.NF4, 480, 4),
    Case(Quantization.NF4, 480, 4, checkpointing=True),
    Case(Quantization.INT8, 120, 8),
    Case(Quantization.NONE, 120, 8),
)
QUICK = (Case(Quantization.NONE, 20, 2),)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.fit", description=__doc__)
    parser.add_argument("--base", type=Path, help="a base's folder (default: the bundled SmolLM2-135M-Instruct)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--quick", action="store_true", help="run one small case, as a smoke test")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="milliner-bench-") as scratch:
        found = weigh(Path(scratch), base=args.base, cases=QUICK if args.quick else CASES)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "fit.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = table(found)
    (args.out / "fit.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def weigh(scratch: Path, *, base: Path | None, cases: tuple[Case, ...]) -> dict[str, Any]:
    """Run all cases; the content of fit.json."""
    about_machine = machine.describe()
    base = base or bundled(scratch / "base")
    runs = [[run(case, base, scratch / f"{number}-{turn}") for turn in range(2)] for number, case in enumerate(cases)]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "make bench-fit",
        "machine": about_machine,
        "versions": machine.versions(),
        "base": base.name,
        "cases": [
            asdict(case)
            | {"name": case.name, "rows": first.rows, "length": first.length}
            | {"computed_bytes": first.computed_bytes, "measured_bytes": [first.measured_bytes, second.measured_bytes]}
            | {"after_bytes": corrected([_weighing(first)], second.computed_bytes)}
            | {"from_others_bytes": corrected(_others(cases, runs, number), first.computed_bytes)}
            for number, (case, (first, second)) in enumerate(zip(cases, runs, strict=True))
        ],
    }


def run(case: Case, base: Path, work: Path) -> MeasuredFit:
    """Prepare and train in one new trainer child."""
    rows = work.with_name(f"{work.name}-rows")
    rows.mkdir()
    result, _ = run_ours(_task(case, base, rows), work)
    report = Report.model_validate_json(Path(result.adapter, "report.json").read_text(encoding="utf-8"))
    if report.fit is None:
        sys.exit(f"{base.name}: memory prediction does not support this base's architecture")
    return report.fit


def table(found: dict[str, Any]) -> str:
    """The results as Markdown: one line per case, then the largest errors and the goals."""
    about = found["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    lines = [
        f"`{found['command']}` on {found['date']}: {about['cpu']}, {about['cores']} cores; {packages}.",
        f"{found['base']}, r={RANK}, all linear modules; peak resident bytes of the trainer process.",
        "",
        "| case | tokens at once | computed | measured | off before | again | off after | off from others |",
        "|---|---|---|---|---|---|---|---|",
    ]
    worst = {"before": 0.0, "after": 0.0}
    for case in found["cases"]:
        first, second = case["measured_bytes"]
        before, after = case["computed_bytes"] / first - 1, case["after_bytes"] / second - 1
        others = case["from_others_bytes"] / first - 1
        worst = {"before": max(worst["before"], abs(before)), "after": max(worst["after"], abs(after))}
        lines.append(
            f"| {case['name']} | {case['rows']} x {case['length']} | {case['computed_bytes'] / 1e9:.3f} GB "
            f"| {first / 1e9:.3f} GB | {before:+.1%} | {second / 1e9:.3f} GB | {after:+.1%} | {others:+.1%} |"
        )
    goals = {"before": BEFORE, "after": AFTER}
    largest = "; ".join(f"{worst[when]:.1%} {when} (goal: {goals[when]:.0%})" for when in goals)
    return "\n".join([*lines, "", f"At worst {largest}."]) + "\n"


def _task(case: Case, base: Path, folder: Path) -> Task:
    drawn, paths = random.Random(SEED), (folder / "train.jsonl", folder / "validation.jsonl")
    for path, rows in zip(paths, (BATCH * STEPS, HELDOUT), strict=True):
        texts = [{"text": " ".join(drawn.choices(WORDS, k=case.words))} for _ in range(rows)]
        path.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    return Task(
        base_dir=str(base),
        base_name=base.name,
        base_revision="0" * 40,
        training_file=str(paths[0]),
        validation_file=str(paths[1]),
        method=Method.of("supervised", n_epochs=1, batch_size=BATCH),
        lora=Lora(r=RANK),
        quantization=case.quantization,
        trainer=TrainerParams(
            packing=case.packing,
            micro_batch=case.micro_batch,
            gradient_checkpointing=case.checkpointing,
            max_steps=STEPS,
        ),
        seed=SEED,
        max_row_bytes=1 << 20,
    )


def _others(cases: tuple[Case, ...], runs: list[list[MeasuredFit]], number: int) -> list[Weighing]:
    """Measurements of the other cases with the same quantization: what a server knows before it has run this case."""
    return [
        _weighing(first)
        for other, (case, (first, _)) in enumerate(zip(cases, runs, strict=True))
        if other != number and case.quantization is cases[number].quantization
    ]


def _weighing(fit: MeasuredFit) -> Weighing:
    return Weighing(computed_bytes=fit.computed_bytes, measured_bytes=fit.measured_bytes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
