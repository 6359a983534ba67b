"""A stub trainer for tests with many jobs: it speaks the whole protocol, starts in 30 ms, and trains a chain of hashes.

Started as `python -S -E -s stub.py PARENT_PID`, through MILLINER_TRAINER_COMMAND. Its commands and events are those of
the real trainer (worker/trainer/main.py), and it also stops, resumes, freezes itself and dies with its parent. Its
model is a hash: each step hashes the previous result, so a step left out or trained twice changes the end result, and
`expected` computes the correct one. A step lasts `seed % 1000` milliseconds.

Before each step it appends a line to `<cache>/witness/<job>.log`: lease epoch, step (from 1), pid, boot-time clock.
Must import only the standard library: other imports would take longer than everything else.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import queue
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

ADAPTER = "adapter_model.safetensors"
PR_SET_PDEATHSIG = 1
SCORE = {"loss": 1.0, "token_accuracy": 0.5, "tokens": 100}

_last_heard = 0.0
_silence: float | None = None
_fencing = threading.Lock()
_stopping: set[str] = set()
_commands: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()


class Interrupted(Exception):
    """The supervisor asked for a stop."""


def expected(job: str, seed: int, steps: int) -> bytes:
    """The adapter that a job with `steps` steps must end with, however often it was interrupted."""
    digest = _first(job, seed)
    for step in range(1, steps + 1):
        digest = _next(digest, step)
    return _adapter(digest)


def main() -> int:
    """Serve commands until stdin ends. The working directory is the attempt's folder: tests read it from /proc."""
    _die_with_parent(int(sys.argv[1]))
    threading.Thread(target=_read, daemon=True).start()
    watched = False
    while (command := _commands.get()) is not None:
        silence = command["task"].get("silence_seconds")
        if silence is not None and not watched:
            threading.Thread(target=_watch, args=(silence,), daemon=True).start()
            watched = True
        _listen(silence)
        os.chdir(Path(command["task"]["training_file"]).parent)
        try:
            {"prepare": _prepare, "train": _train, "verify": _verify, "export": _export}[command["op"]](command)
        except OSError as error:
            _emit("failed", command["job"], code="disk_full", message=str(error), retryable=True)
        finally:
            _listen(None)
    return 0


def _die_with_parent(parent: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the parent process has ended")


def _read() -> None:
    global _last_heard  # noqa: PLW0603 (few writers, one lock; a class would add nothing)
    _last_heard = _boottime()
    for line in sys.stdin.buffer:
        command = json.loads(line)
        if command["op"] == "alive":
            _fence()  # first: after a long stop, this message may have been in the pipe all the time
            _last_heard = _boottime()
        elif command["op"] == "stop":
            _stopping.add(command["job"])
        else:
            _stopping.discard(command["job"])
            _commands.put(command)
    _commands.put(None)


def _listen(silence: float | None) -> None:
    """Expect a message from the supervisor at least every `silence` seconds; None: expect none."""
    global _last_heard, _silence
    with _fencing:
        _last_heard, _silence = _boottime(), silence


def _watch(silence: float) -> None:
    while True:
        time.sleep(silence / 4)
        _fence()


def _fence() -> None:
    """Freeze if the supervisor is silent, because it may have lost its lease. Each thread calls this first."""
    global _last_heard  # noqa: PLW0603 (as above)
    with _fencing:
        if _silence is not None and _boottime() - _last_heard > _silence:
            # To this thread, so that it stops at this line. A signal to the process may be handled by any thread.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
            _last_heard = _boottime()


def _boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


# ---------------------------------------------------------------- the four commands


def _prepare(command: dict[str, Any]) -> None:
    task, trainer = command["task"], command["task"]["trainer"]
    _emit("phase", command["job"], phase="tokenizing")
    rows = Path(task["training_file"]).read_bytes().count(b"\n") + 1
    steps = trainer["max_steps"] or rows
    recipe = {
        "method": "supervised",
        "beta": None,
        "n_epochs": 1,
        "batch_size": 1,
        "learning_rate_multiplier": 1.0,
        "learning_rate": 1e-3,
        "schedule": "linear",
        "warmup_steps": 0,
        "total_steps": steps,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "r": 4,
        "alpha": 8.0,
        "dropout": 0.0,
        "target_modules": "all-linear",
        "use_rslora": False,
        "use_dora": False,
        "quantization": task["quantization"],
        "max_length": 64,
        "packing": True,
        "micro_batch": 1,
        "save_every": trainer["save_every"] or max(1, steps // 5),
        "eval_every": None,
        "early_stopping": None,
        "seed": task["seed"],
    }
    plan = {
        "rows": rows,
        "heldout_rows": 1,
        "tokens": 10 * rows,
        "trained_tokens": 10 * rows,
        "longest_row": 10,
        "truncated_rows": 0,
        "dropped_rows": 0,
        "warnings": [],
        "recipe": recipe,
    }
    _emit("prepared", command["job"], plan=plan)


def _train(command: dict[str, Any]) -> None:
    job, recipe, work_dir = command["job"], command["recipe"], Path(command["work_dir"])
    for phase in ("tokenizing", "loading", "evaluating", "training"):
        _emit("phase", job, phase=phase)
    step, digest = 0, _first(job, recipe["seed"])
    if command["resume_from"] is not None:
        state = json.loads(Path(command["resume_from"], "state.json").read_text())
        step, digest = state["step"], state["digest"]
    saved = step
    try:
        step, saved, digest = _loop(command, step, digest)
    except Interrupted as stop:
        step, saved, digest = stop.args
        if step != saved:
            _save(job, work_dir, step, digest, recipe)
        _stopping.discard(job)
        _emit("stopped", job, step=step)
        return
    _emit("phase", job, phase="evaluating")
    report = _report(recipe, step)
    folder = work_dir / "adapter"
    metrics = "".join(json.dumps(_metrics(s, recipe)) + "\n" for s in range(1, step + 1))
    config = {"peft_type": "LORA", "r": recipe["r"], "base_model_name_or_path": command["task"]["base_name"]}
    texts = {"adapter_config.json": json.dumps(config), "report.json": json.dumps(report), "metrics.jsonl": metrics}
    _write(folder, {ADAPTER: _adapter(digest)} | {name: text.encode() for name, text in texts.items()})
    _emit("done", job, path=str(folder), report=report)


def _loop(command: dict[str, Any], step: int, digest: str) -> tuple[int, int, str]:
    """Train from `step` to the end; returns step, last saved step and digest. Raises Interrupted with these three."""
    job, recipe = command["job"], command["recipe"]
    cache, epoch = Path.cwd().parents[1], Path.cwd().name.rpartition("-")[2]
    witness = cache / "witness" / f"{job}.log"
    witness.parent.mkdir(exist_ok=True)
    saved, line = step, os.open(witness, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    total, save_every = recipe["total_steps"], recipe["save_every"]
    while step < total:
        if job in _stopping:
            raise Interrupted(step, saved, digest)
        _fence()
        os.write(line, f"{epoch} {step + 1} {os.getpid()} {_boottime():.6f}\n".encode())
        time.sleep(recipe["seed"] % 1000 / 1000)
        step += 1
        digest = _next(digest, step)
        _emit("metrics", job, metrics=_metrics(step, recipe))
        # Like the real trainer, save the last step. A run with `save_every` above its steps saves none, for tests in
        # which the upload of the adapter must be the first to meet an outage.
        if step % save_every == 0 or (step == total and save_every <= total):
            _save(job, Path(command["work_dir"]), step, digest, recipe)
            saved = step
    return step, saved, digest


def _verify(command: dict[str, Any]) -> None:
    """Check that the published adapter is the end of the chain."""
    job, recipe, folder = command["job"], command["recipe"], Path(command["adapter_dir"])
    if (folder / ADAPTER).read_bytes() != expected(job, recipe["seed"], command["report"]["steps"]):
        message = "the published adapter is not the end of the hash chain"
        _emit("failed", job, code="adapter_not_reproducible", message=message, retryable=False)
        return
    proof = {
        "base": SCORE,
        "tuned": SCORE | {"loss": 0.5},
        "base_deviation": 0.0,
        "tuned_deviation": 0.0,
        "tolerance": 0.0,
        "max_logit_difference": 1.0,
        "tensors": 1,
        "tokenizer_sha256": hashlib.sha256(b"").hexdigest(),
        "vllm": {"servable": False, "max_lora_rank": None, "reasons": ["it is a chain of hashes"]},
    }
    _emit("verified", job, proof=proof, versions={"stub": "1"})


def _export(command: dict[str, Any]) -> None:
    """Export a copy of the adapter."""
    name, adapter = command["name"], Path(command["adapter_dir"], ADAPTER).read_bytes()
    folder = Path(command["work_dir"], "exports", name)
    _write(folder, {ADAPTER: adapter})
    _emit("exported", command["job"], path=str(folder), export={"name": name, "bytes": len(adapter)})


# ---------------------------------------------------------------- files and events


def _first(job: str, seed: int) -> str:
    return hashlib.sha256(f"{job} {seed}".encode()).hexdigest()


def _next(digest: str, step: int) -> str:
    return hashlib.sha256(f"{digest} {step}".encode()).hexdigest()


def _adapter(digest: str) -> bytes:
    return hashlib.sha256(digest.encode()).digest() * 128


def _save(job: str, work_dir: Path, step: int, digest: str, recipe: dict[str, Any]) -> None:
    folder = work_dir / "checkpoints" / f"step-{step:08d}"
    state = json.dumps({"step": step, "digest": digest}).encode()
    _write(folder, {ADAPTER: _adapter(digest), "state.json": state})
    _emit("checkpoint", job, step=step, path=str(folder), metrics=_metrics(step, recipe))


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """Write all files or none, through a temporary folder."""
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, data in files.items():
        (partial / name).write_bytes(data)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _metrics(step: int, recipe: dict[str, Any]) -> dict[str, Any]:
    return {
        "step": step,
        "total_steps": recipe["total_steps"],
        "train_loss": 1 / step,
        "train_mean_token_accuracy": 0.5,
        "learning_rate": recipe["learning_rate"],
        "grad_norm": 1.0,
        "trained_tokens": 10 * step,
        "tokens_per_second": 100.0,
    }


def _report(recipe: dict[str, Any], steps: int) -> dict[str, Any]:
    return {
        "base": SCORE,
        "tuned": SCORE | {"loss": 0.5},
        "change": {"loss": -0.5, "low": None, "high": None, "rows": 1, "resamples": 0, "verdict": "unknown"}
        | {"caveats": []},
        "samples": [],
        "heldout_source": "training_file",
        "heldout_lines": [],
        "quantization": recipe["quantization"],
        "compute_dtype": "float32",
        "steps": steps,
        "trained_tokens": 10 * steps,
        "trainable_parameters": 1,
        "total_parameters": 2,
        "adapter_bytes": 4,
        "base_bytes": 2,
        "base_fp32_bytes": 4,
        "full_finetuning": {"weights_bytes": 4, "gradients_bytes": 4, "optimizer_bytes": 8, "total_bytes": 16},
        "train_seconds": 1.0,
        "tokens_per_second": 10.0 * steps,
        "peak_memory_bytes": 1,
    }


def _emit(event: str, job: str, **fields: Any) -> None:
    os.write(1, json.dumps({"event": event, "job": job, **fields}).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())
