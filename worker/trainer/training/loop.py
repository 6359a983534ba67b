"""Train an adapter, from start to end: rows, base, adapter, loop, score, artifact. Read this file first.

LoRA (Hu et al. 2021, arXiv:2106.09685) keeps the base model frozen. Beside each linear layer y = W x it trains two
small matrices, A (r, in) and B (out, r), so that the layer computes y = W x + (alpha / r) B A x. B starts at zero:
before the first step the model is exactly the base. QLoRA (Dettmers et al. 2023, arXiv:2305.14314) also stores W in
4 bits and dequantizes it whenever it is used. Gradients flow through W to earlier layers, but only A and B, in fp32,
have gradients of their own and AdamW state. That is why training needs so little memory.

The loop itself is ordinary:

1. Score the base on held-out rows.
2. For each step: compute the gradient of the next batch (`training/step.py`) and let AdamW update A and B. At
   intervals, score the adapter on the held-out rows and write a checkpoint.
3. Score the final adapter on the same rows, and write it with a report that compares both scores.

The loss of supervised training is the mean cross entropy of the trained tokens (`methods/sft.py`): the answers' tokens,
or all tokens of a plain text.

Owns: the order of these parts. Must not know about pipes or processes: the caller passes `emit` and `stopping`.

A resumed run ends with the same adapter, bit for bit, as one that was never stopped (on a CPU; on CUDA as far as its
kernels are deterministic). The order of examples is a function of seed and epoch, and the checkpoint holds the rest.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from shared.schemas.requests import Phase
from worker.trainer.artifact.write import write_artifact
from worker.trainer.data import dataset
from worker.trainer.data.dataset import Split, split
from worker.trainer.data.encoding import Encoder
from worker.trainer.evaluation.evaluate import RowScores
from worker.trainer.forward import fallback, layout_probe
from worker.trainer.forward.interrupted import Interrupted
from worker.trainer.forward.layout import Layout
from worker.trainer.model import classification_head, fused_lora, initial_adapter
from worker.trainer.model.base import Base, attach, detach, keep_activations
from worker.trainer.model.full_weights import Adapted
from worker.trainer.protocol import CheckpointSaved, Done, PhaseEntered, Stopped, Train
from worker.trainer.system import free_memory, peak_memory
from worker.trainer.system.resource_errors import is_disk_full
from worker.trainer.training import checkpoint, memory_trial, optimizer, summary
from worker.trainer.training.checkpoint import RunState
from worker.trainer.training.memory_account import open_account
from worker.trainer.training.run import Emit, Run, log
from worker.trainer.training.scoring import evaluate_step, final_score, is_trained, score_before_training
from worker.trainer.training.step import optimizer_step

LoadBase = Callable[[], Base]

#: Longest time between two checkpoints, in seconds, and so the most work that is lost when a machine dies. A step that
#: takes longer than this is always finished first.
SAVE_SECONDS = 300.0


def train(
    command: Train,
    load_base: LoadBase,
    *,
    emit: Emit,
    stopping: Callable[[], bool],
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Run the job to its end and emit `done`; or, if a stop is requested, save a checkpoint and emit `stopped`.

    Raises TrainingFailed for an error that the user must fix. `tick` is called for each row that is read, `stopping`
    before each micro-batch.
    """
    task, recipe, job = command.task, command.recipe, command.job
    if task.torch_threads > 0:
        torch.set_num_threads(task.torch_threads)

    # Rows: read, encode with the base's tokenizer, cut to the recipe's length, and hold some out for scoring.
    emit(PhaseEntered(job=job, phase=Phase.TOKENIZING))
    encoder = Encoder(task.base_dir)
    rows = split(dataset.load(task, encoder, tick=tick), recipe.max_length, seed=recipe.seed)

    # Base: frozen and quantized. If the previous job used the same base, it is still in memory.
    emit(PhaseEntered(job=job, phase=Phase.LOADING))
    peak_memory.begin()
    base = load_base()
    if recipe.labels is not None:
        classification_head.initialize(base.model, base.uninitialized, seed=recipe.seed, pad=encoder.pad)
    layout, warnings = layout_probe.layout_of(recipe, base, rows.train, encoder)
    for warning in warnings:
        log(emit, job, warning, "warn")

    # Adapter: A is drawn from torch's global generator, so set the seeds first.
    random.seed(recipe.seed)
    np.random.seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    attached = attach(base, recipe)
    try:
        run = _begin(command, rows, base, attached.adapted, layout, emit=emit, stopping=stopping)
        try:
            tuned = _loop(run)
            _finish(run, encoder, tuned)
        except Interrupted:
            _save(run)
            run.emit(Stopped(job=job, step=run.state.step))
    finally:
        detach(attached)


def _begin(
    command: Train,
    rows: Split,
    base: Base,
    adapted: Adapted,
    layout: Layout,
    *,
    emit: Emit,
    stopping: Callable[[], bool],
) -> Run:
    """Build the state of the run: at step 0, or at the step of the checkpoint to resume from."""
    recipe, task = command.recipe, command.task
    adamw = optimizer.make(adapted, recipe)
    start = initial_adapter.load(task.start_from, adapted) if task.start_from is not None else None
    if start is not None:
        initial_adapter.apply(adapted, start)
    state, best = RunState(recipe=recipe), None
    if command.resume_from is not None:
        state, best = checkpoint.load(Path(command.resume_from), adapted, adamw, recipe)
        # Keep the number of threads, even if this machine has more or fewer cores: it decides how a step is split into
        # micro-batches, and so how sums are rounded.
        layout = replace(layout, lanes=state.lanes)
    state.lanes = layout.lanes
    levels = fallback.levels(layout, base, longest=max(map(len, rows.train)))
    state.fallback_level = min(max(state.fallback_level, command.fallback_level), len(levels) - 1)
    if state.fallback_level:
        fused_lora.drop_resident_weights(adapted)
    run = Run(
        command=command,
        emit=emit,
        stopping=stopping,
        rows=rows,
        base=base,
        adapted=adapted,
        optimizer=adamw,
        levels=levels,
        state=state,
        start=start,
        account=open_account(base, task, recipe, from_step=state.step),
        best=best,
        saved_step=state.step,
        save_tried_at=time.monotonic(),
    )
    keep_activations(adapted, kept=not run.layout.checkpointing)
    if start is not None:
        run.log(f"training starts from {task.start_name}")
    for decision in summary.decisions(recipe, rows, base, adapted, run.layout):
        run.log(decision)
    if state.fallback_level:
        change = fallback.difference(levels[0], run.layout)
        run.log(f"an earlier attempt ran out of memory: {change}; the result is the same up to rounding")
    if state.step:
        run.log(f"resuming from the checkpoint of step {state.step}")
    return run


def _loop(run: Run) -> RowScores:
    """Train to the end and return the score of the final adapter. Raises Interrupted if a stop is requested."""
    run.emit(PhaseEntered(job=run.command.job, phase=Phase.EVALUATING))
    score_before_training(run)
    free_memory.free()  # scoring leaves gaps in the heap, and training needs blocks of other sizes
    run.emit(PhaseEntered(job=run.command.job, phase=Phase.TRAINING))
    memory_trial.try_heaviest_rows(run)
    while True:
        if run.state.evaluation_due:
            evaluate_step(run)
        run.check_stop()
        trained = is_trained(run)
        overdue = time.monotonic() - run.save_tried_at >= SAVE_SECONDS
        if trained or overdue or run.state.step % run.recipe.save_every == 0:
            _save(run)  # after the last step too, so that a crash while scoring or writing repeats no step
        if trained:
            break
        optimizer_step(run)
    run.emit(PhaseEntered(job=run.command.job, phase=Phase.EVALUATING))
    free_memory.free()  # or the heap of a CPU would keep memory of activations while scoring needs its own
    return final_score(run)


def _finish(run: Run, encoder: Encoder, tuned: RowScores) -> None:
    """Write the artifact and emit `done`."""
    job, folder = run.command.job, Path(run.command.work_dir) / "adapter"
    report = summary.report(run, encoder, tuned)
    write_artifact(
        folder,
        run.adapted,
        encoder,
        job=job,
        task=run.command.task,
        recipe=run.recipe,
        report=report,
        metrics=run.state.metrics,
        head=run.base.head,
    )
    run.emit(Done(job=job, path=str(folder), report=report, fallback_level=run.state.fallback_level))


def _save(run: Run) -> None:
    """Write a checkpoint, unless the latest one is of this very step.

    On a full disk training continues without this checkpoint; the previous one remains until the next is due.
    """
    if run.state.step == run.saved_step:
        return
    folder = Path(run.command.work_dir) / "checkpoints" / f"step-{run.state.step:08d}"
    run.save_tried_at = time.monotonic()
    try:
        checkpoint.save(folder, run.adapted, run.optimizer, run.state, run.best)
    except (OSError, SafetensorError) as error:
        if not is_disk_full(error):
            raise
        if not run.disk_is_full:
            run.log(f"no checkpoint at step {run.state.step}, the previous one is kept: {error}", "warn")
        run.disk_is_full = True
        return
    run.saved_step, run.disk_is_full = run.state.step, False
    metrics = checkpoint.latest(run.state)
    run.emit(CheckpointSaved(job=run.command.job, step=run.state.step, path=str(folder), metrics=metrics))
