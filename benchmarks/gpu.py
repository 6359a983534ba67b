"""Measure our training step on a CUDA device, with random weights in real shapes: `python -m benchmarks.gpu`.

Owns: the shapes, the cases and their table. Speed and memory do not depend on the values of the weights, so no model
has to be downloaded. The trainer's own code loads, quantizes and trains the weights. Writes gpu.json and gpu.md.
--quick uses a tiny shape on any device, as a smoke test. Must not know jobs: it runs optimizer steps only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import machine
from shared.estimation import architecture, memory_model
from shared.schemas.memory import Kind
from shared.schemas.requests import Quantization
from shared.schemas.results import Recipe
from worker.trainer import methods
from worker.trainer.data.encoding import Encoded
from worker.trainer.forward.batches import Batch, collate
from worker.trainer.forward.layout import Layout
from worker.trainer.model.base import Base, attach, keep_activations, load_base, trainable

ROOT = Path(__file__).resolve().parents[1]
#: The models' config.json, without the fields that do not affect training.
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    },
    "Qwen2.5-7B": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    },
}  # fmt: skip
TINY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 8192,
}  # fmt: skip
RANK, WARM_UP, STEPS = 16, 2, 6
DEVICES: dict[str, Kind] = {"cuda": "cuda", "cpu": "cpu"}
#: Tokens of a packed document: short, like a conversation.
DOCUMENT = 256
#: --quick divides the length of rows by this.
SHORTER = 32


@dataclass(frozen=True, slots=True)
class Case:
    """The batch of a step: `rows` of `length` tokens, each one document, or several short ones if packed."""

    quantization: Quantization
    rows: int
    length: int
    packed: bool = False

    def __str__(self) -> str:
        return f"{self.quantization.value}, {self.rows} x {self.length:,}{' packed' if self.packed else ''}"


CASES = [
    Case(quantization, rows, length, packed)
    for quantization in (Quantization.NONE, Quantization.NF4)
    for rows, length, packed in ((2, 2048, False), (1, 8192, False), (2, 2048, True))
]


@dataclass(frozen=True, slots=True)
class Result:
    """The figures of the median step. `share`: of the device's measured bf16 FLOP/s. Bytes: torch's peak allocation."""

    shape: str
    case: str
    tokens_per_second: float
    share: float
    peak_bytes: int
    predicted_bytes: int
    seconds: list[float]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="run only this shape; may be repeated")
    parser.add_argument("--compile", action="store_true", help="compile the backbone with torch.compile")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--quick", action="store_true", help="run a tiny shape on any device, as a smoke test")
    args = parser.parse_args(argv)
    if not (args.quick or torch.cuda.is_available()):
        sys.exit("no CUDA device: this benchmark needs one; --quick runs a tiny shape on the CPU")
    shapes = {"tiny": TINY} if args.quick else {name: SHAPES[name] for name in args.shape or SHAPES}
    cases = [replace(case, length=case.length // SHORTER) for case in CASES] if args.quick else CASES
    found = measure(shapes, cases, compiled=args.compile)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (args.out / "gpu.md").write_text(table(found), encoding="utf-8")
    print(table(found))
    return 0


def measure(shapes: dict[str, dict[str, Any]], cases: list[Case], *, compiled: bool) -> dict[str, Any]:
    """Run every case of every shape; the content of gpu.json. Cases that run out of memory are listed as `failed`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    limit = machine.bf16_flops(device)
    results, failed = [], {}
    for name, shape in shapes.items():
        with tempfile.TemporaryDirectory(prefix="milliner-bench-") as folder:
            _write(shape, Path(folder), device)
            for case in cases:
                try:
                    results.append(run(name, shape, Path(folder), case, limit=limit, compiled=compiled))
                except torch.OutOfMemoryError as error:
                    failed[f"{name}, {case}"] = str(error).splitlines()[0]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"make bench-gpu{' (--compile)' if compiled else ''}",
        "machine": machine.describe() | {"bf16_gemm_flops": round(limit)},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU",
        "versions": machine.versions(),
        "results": [asdict(result) for result in results],
        "failed": failed,
    }


def run(name: str, shape: dict[str, Any], folder: Path, case: Case, *, limit: float, compiled: bool) -> Result:
    """Load the base, attach an adapter, and time a few steps on random tokens, all of them trained."""
    base = load_base(str(folder), case.quantization)
    recipe = _recipe(case)
    adapted = attach(base, recipe).adapted
    keep_activations(adapted, kept=base.device.type != "cuda")
    if compiled:
        base.model.get_decoder().compile()
    parameters = list(trainable(adapted).values())
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, fused=True)
    layout = Layout(packing=case.packed, chunked=True, micro_batch=case.rows, pad=0)
    batch, seconds = _batch(case, shape["vocab_size"], base), []
    if base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP + STEPS):
        started = time.perf_counter()
        with base.precision():
            loss = methods.loss(adapted, batch, layout, recipe)
        torch.autograd.backward(loss.sums.sum() / sum(loss.counts))
        optimizer.step()
        optimizer.zero_grad()
        if base.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    tokens, kind = case.rows * case.length, DEVICES[base.device.type]
    speed = tokens / statistics.median(seconds[WARM_UP:])
    setup = memory_model.Setup(case.quantization, RANK, case.rows, case.length, packing=case.packed, device=kind)
    known = architecture.read_config(shape | {"architectures": None})
    predicted = memory_model.peak_memory(known, setup)
    return Result(
        shape=name,
        case=str(case),
        tokens_per_second=round(speed, 1),
        share=round(speed * memory_model.flop_per_token(known, setup) / limit, 4),
        peak_bytes=torch.cuda.max_memory_allocated() if base.device.type == "cuda" else 0,
        predicted_bytes=predicted.total - predicted.overhead,
        seconds=[round(second, 4) for second in seconds],
    )


def table(found: dict[str, Any]) -> str:
    """The results as Markdown: one line per case."""
    packages = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    lines = [
        f"`{found['command']}` on {found['date']}: {found['device']}; {packages}.",
        f"bf16 products run at {found['machine']['bf16_gemm_flops'] / 1e12:,.1f} TFLOP/s here; r={RANK}, all linear, "
        f"medians of {STEPS} steps; FLOP counted by `shared/estimation/memory_model.py`, "
        "with checkpointing's second forward.",
        "",
        "| | | trained tokens/s | share of the limit | peak allocated | predicted |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one['shape']} | {one['case']} | {one['tokens_per_second']:,.0f} | {one['share']:.0%} "
        f"| {one['peak_bytes'] / 1e9:.2f} GB | {one['predicted_bytes'] / 1e9:.2f} GB |"
        for one in found["results"]
    ]
    lines += [f"| {case} | out of memory: {why} |" for case, why in found["failed"].items()]
    return "\n".join(lines) + "\n"


def _write(shape: dict[str, Any], folder: Path, device: torch.device) -> None:
    """Write a model folder of this shape. Random weights are drawn on the device, where that takes only seconds."""
    torch.manual_seed(0)
    kind = {key: value for key, value in shape.items() if key != "model_type"}
    with device:
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(shape["model_type"], **kind), dtype=torch.bfloat16
        )
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()


def _batch(case: Case, vocabulary: int, base: Base) -> Batch:
    generator = np.random.Generator(np.random.PCG64(0))
    size = min(DOCUMENT, case.length) if case.packed else case.length
    rows = [
        [
            Encoded(0, generator.integers(0, vocabulary, size).astype(np.int32), np.ones(size, dtype=bool))
            for _ in range(case.length // size)
        ]
        for _ in range(case.rows)
    ]
    return collate(rows, packing=case.packed, pad=0).to(base.device)


def _recipe(case: Case) -> Recipe:
    return Recipe(
        n_epochs=1, batch_size=case.rows, learning_rate_multiplier=1.0, learning_rate=1e-4, schedule="cosine",
        warmup_steps=0, total_steps=STEPS, weight_decay=0.0, max_grad_norm=1.0, r=RANK, alpha=32.0, dropout=0.0,
        target_modules="all-linear", use_rslora=False, use_dora=False, quantization=case.quantization,
        max_length=case.length, packing=case.packed, micro_batch=case.rows, save_every=100, eval_every=None,
        early_stopping=None, seed=0,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
