"""One supervised run, top to bottom: rows, base, adapter, loop, score, adapter folder.

Owns: the order of things, and saying aloud each decision. Must not know about pipes or processes: it gets `emit` and
`stopping`.

A resumed run ends with the same adapter, bit for bit, as one that was never stopped (on a CPU; on CUDA as far as its
kernels are deterministic): the order of examples is a function of seed and epoch, and a checkpoint holds the rest.
"""

from __future__ import annotations

import math
import random
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors import SafetensorError

from shared.errors import TrainingFailed
from shared.schemas.requests import Phase
from shared.schemas.results import Metrics, Recipe, Report, Sample
from worker.trainer import methods
from worker.trainer.artifact.write import write_artifact
from worker.trainer.data import dataset
from worker.trainer.data.dataset import Split, split
from worker.trainer.data.encoding import Encoder, Row
from worker.trainer.evaluation import evaluate, report, samples
from worker.trainer.evaluation.evaluate import RowScores
from worker.trainer.forward import fallback, layout_probe, threads
from worker.trainer.forward.batches import Batch, trained_tokens
from worker.trainer.forward.interrupted import Interrupted
from worker.trainer.forward.layout import Layout
from worker.trainer.methods import Loss, Tally
from worker.trainer.model import adapter_weights, classification_head, fused_lora, initial_adapter
from worker.trainer.model.adapter_weights import Tensors
from worker.trainer.model.base import Base, attach, detach, keep_activations, trainable
from worker.trainer.model.full_weights import Adapted
from worker.trainer.model.initial_adapter import InitialAdapter
from worker.trainer.planning.recipe import learning_rate_at
from worker.trainer.protocol import CheckpointSaved, Done, Measured, Notice, PhaseEntered, Stopped, Train, TrainerEvent
from worker.trainer.system import free_memory, peak_memory
from worker.trainer.system.resource_errors import is_disk_full, is_out_of_memory
from worker.trainer.training import checkpoint, memory_trial, optimizer, random_state, summary
from worker.trainer.training.checkpoint import RunState
from worker.trainer.training.memory_account import Account, measured, open_account

Emit = Callable[[TrainerEvent], None]
LoadBase = Callable[[], Base]
T = TypeVar("T")

#: A checkpoint is left at least this often, however slow the steps: it is what a dead machine costs. Saving only reads.
SAVE_SECONDS = 300.0


@dataclass(slots=True)
class Run:
    """Everything that lives as long as the loop. `save_tried_at` is on the monotonic clock.

    `latest` is the adapter's last score and the step it was taken at; a resumed run takes it again.
    """

    command: Train
    emit: Emit
    stopping: Callable[[], bool]
    rows: Split
    base: Base
    adapted: Adapted
    optimizer: torch.optim.Optimizer
    rungs: list[Layout]
    state: RunState
    start: InitialAdapter | None
    account: Account
    best: Tensors | None
    saved_step: int
    save_tried_at: float
    latest: tuple[int, RowScores] | None = None
    disk_is_full: bool = False

    @property
    def recipe(self) -> Recipe:
        return self.command.recipe

    @property
    def layout(self) -> Layout:
        return self.rungs[self.state.memory_halvings]

    def say(self, message: str, level: str = "info") -> None:
        _say(self.emit, self.command.job, message, level)

    def go_on(self) -> None:
        """Raises Interrupted once a stop is asked for."""
        if self.stopping():
            raise Interrupted


def train(
    command: Train,
    load_base: LoadBase,
    *,
    emit: Emit,
    stopping: Callable[[], bool],
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Ends with `done` or `stopped`. Raises TrainingFailed for what the user must mend.

    `tick` is called with each row that is read, and `stopping` before each micro-batch.
    """
    task, recipe, job = command.task, command.recipe, command.job
    if task.torch_threads > 0:
        torch.set_num_threads(task.torch_threads)
    emit(PhaseEntered(job=job, phase=Phase.TOKENIZING))
    encoder = Encoder(task.base_dir)
    rows = split(dataset.load(task, encoder, tick=tick), recipe.max_length, seed=recipe.seed)
    emit(PhaseEntered(job=job, phase=Phase.LOADING))
    peak_memory.begin()
    base = load_base()
    if recipe.labels is not None:
        classification_head.draw(base.model, base.blank, seed=recipe.seed, pad=encoder.pad)
    layout, warnings = layout_probe.layout_of(recipe, base, rows.train, encoder)
    for warning in warnings:
        _say(emit, job, warning, "warn")
    random.seed(recipe.seed)
    np.random.seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    adapted = attach(base, recipe)
    try:
        run = _start(command, rows, base, adapted, layout, emit=emit, stopping=stopping)
        _finish(run, encoder)
    finally:
        detach(adapted)


def _start(
    command: Train,
    rows: Split,
    base: Base,
    adapted: Adapted,
    layout: Layout,
    *,
    emit: Emit,
    stopping: Callable[[], bool],
) -> Run:
    """The point before the next optimizer step, which is step 0 or where a checkpoint was left."""
    recipe = command.recipe
    opt = optimizer.make(adapted, recipe)
    origin = initial_adapter.load(command.task.start_from, adapted) if command.task.start_from is not None else None
    if origin is not None:
        initial_adapter.apply(adapted, origin)
    state, best = RunState(recipe=recipe), None
    if command.resume_from is not None:
        state, best = checkpoint.load(Path(command.resume_from), adapted, opt, recipe)
        layout = replace(layout, lanes=state.lanes)  # another machine's cores would split a step into other sums
    state.lanes = layout.lanes
    rungs = fallback.rungs(layout, base, longest=max(map(len, rows.train)))
    state.memory_halvings = min(max(state.memory_halvings, command.memory_halvings), len(rungs) - 1)
    if state.memory_halvings:
        fused_lora.drop_resident_weights(adapted)
    account = open_account(base, command.task, recipe, from_step=state.step)
    now = time.monotonic()
    run = Run(command, emit, stopping, rows, base, adapted, opt, rungs, state, origin, account, best, state.step, now)
    keep_activations(adapted, kept=not run.layout.checkpointing)
    if run.start is not None:
        run.say(f"it starts as {command.task.start_name}")
    for decision in summary.lines(recipe, rows, base, adapted, run.layout):
        run.say(decision)
    if state.memory_halvings:
        run.say(f"memory ran out before: {fallback.difference(rungs[0], run.layout)}, the same mathematically")
    if state.step:
        run.say(f"going on from the checkpoint of step {state.step}")
    return run


def _finish(run: Run, encoder: Encoder) -> None:
    """Train, and leave an adapter folder; or a checkpoint, where a stop is asked for."""
    job, folder = run.command.job, Path(run.command.work_dir) / "adapter"
    try:
        found = _report(run, encoder, _loop(run))
        write_artifact(
            folder,
            run.adapted,
            encoder,
            job=job,
            task=run.command.task,
            recipe=run.recipe,
            report=found,
            metrics=run.state.metrics,
        )
        run.emit(Done(job=job, path=str(folder), report=found, memory_halvings=run.state.memory_halvings))
    except Interrupted:
        _save(run)
        run.emit(Stopped(job=job, step=run.state.step))


def _loop(run: Run) -> RowScores:
    """Train to the end and score the result. Raises Interrupted when a stop is asked for."""
    run.emit(PhaseEntered(job=run.command.job, phase=Phase.EVALUATING))
    _score_outset(run)
    free_memory.free()  # rows of other shapes left gaps, to which training would add its own
    run.emit(PhaseEntered(job=run.command.job, phase=Phase.TRAINING))
    memory_trial.try_heaviest_rows(run, _accumulate, _narrowing)
    while True:
        if run.state.evaluation_due:
            _evaluate(run)
        run.go_on()
        trained = _is_trained(run)
        overdue = time.monotonic() - run.save_tried_at >= SAVE_SECONDS
        if trained or overdue or run.state.step % run.recipe.save_every == 0:
            _save(run)  # the last step too: what comes after it may be interrupted, and costs no step then
        if trained:
            break
        _step(run)
    run.emit(PhaseEntered(job=run.command.job, phase=Phase.EVALUATING))
    free_memory.free()  # what a CPU's heap has kept of activations would be added to what comes now
    if run.best is not None and run.state.best_step != run.state.step:
        adapter_weights.set_adapter(run.adapted, run.best)
        run.latest = None
        run.say(f"step {run.state.best_step} scored best and is the one that is kept")
    if run.latest is not None and run.latest[0] == run.state.step:
        return run.latest[1]
    return _score(run, adapter=True)


def _score_outset(run: Run) -> None:
    """What there was before a step was taken, unless a checkpoint has the scores.

    Once more where only the end is left to do: the proof may have found that a score in the checkpoint is wrong.
    """
    state, rows = run.state, len(run.rows.heldout)
    if state.base is None or len(state.base_nats) != rows or _is_trained(run):
        scored = _score(run, adapter=False)
        state.base, state.base_nats = scored.mean, scored.nats.tolist()
        untrained = ", which is chance: its head is untrained" if run.base.blank else ""
        run.say(f"the base alone: loss {state.base.loss:.4f} on {rows} held-out rows{untrained}")
    if run.start is not None and (state.start is None or len(state.start_nats) != rows or _is_trained(run)):
        with initial_adapter.applied(run.adapted, run.start):
            scored = _score(run, adapter=True)
        state.start, state.start_nats = scored.mean, scored.nats.tolist()
        run.say(f"the adapter that it starts from: loss {state.start.loss:.4f}")


def _step(run: Run) -> None:
    """One optimizer step over `batch_size` examples. Asked to stop, raises Interrupted with everything as it was."""
    recipe, state = run.recipe, run.state
    started = time.perf_counter()
    examples = dataset.step_examples(run.rows.train, state.step, batch_size=recipe.batch_size, seed=recipe.seed)
    score = _narrowing(run, lambda: _accumulate(run, examples), when=f"at step {state.step + 1}").score()
    rate = learning_rate_at(recipe, state.step)
    optimizer.set_rate(run.optimizer, rate)
    norm = torch.nn.utils.clip_grad_norm_(trainable(run.adapted).values(), recipe.max_grad_norm).item()
    if not (math.isfinite(score.loss) and math.isfinite(norm)):
        raise _diverged(f"at step {state.step + 1}: loss {score.loss}, gradient norm {norm}")
    run.optimizer.step()
    run.optimizer.zero_grad()
    seconds, tokens = time.perf_counter() - started, trained_tokens(examples)
    state.step += 1
    state.trained_tokens += tokens
    state.seconds += seconds
    # What was not scored cannot be the best: with early stopping, the last step is as well.
    last = recipe.early_stopping is not None and state.step == recipe.total_steps
    state.evaluation_due = recipe.eval_every is not None and (state.step % recipe.eval_every == 0 or last)
    _record(
        run,
        Metrics(
            step=state.step,
            total_steps=recipe.total_steps,
            train_loss=score.loss,
            train_mean_token_accuracy=score.token_accuracy,
            train_reward_accuracy=score.reward_accuracy,
            train_reward_margin=score.reward_margin,
            learning_rate=rate,
            grad_norm=norm,
            trained_tokens=state.trained_tokens,
            tokens_per_second=tokens / seconds,
        ),
    )


def _accumulate(run: Run, examples: list[Row], *, turn: int | None = None) -> Tally:
    """The gradient of the mean loss of the whole step, in as many micro-batches as the layout takes.

    Of these, only those of one `turn`, if that is named. An error, or Interrupted, leaves no gradient and no random
    number drawn.
    """
    layout, weight, tally = run.layout, methods.weight(examples, run.recipe), Tally()
    parameters = list(trainable(run.adapted).values())

    def gradients(batch: Batch) -> tuple[Loss, Sequence[torch.Tensor | None]]:
        with run.base.precision():
            loss = methods.loss(run.adapted, batch.to(run.base.device), layout, run.recipe, start=run.start)
        # Every micro-batch is divided by the weight of the whole step, so splitting does not change the gradient.
        return loss, torch.autograd.grad(loss.sums.sum() / weight, parameters, allow_unused=True)

    random_before = random_state.torch_random()
    try:
        # In the order of the micro-batches, whichever was done first: a sum of rounded numbers depends on it.
        for loss, found in threads.run_in_order(
            gradients, layout.split(examples, turn), layout.lanes, before=run.go_on
        ):
            for parameter, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
            tally.add(loss)
            del loss, found, gradient  # or they would be held until the next ones are there
    except Exception:
        run.optimizer.zero_grad()
        random_state.set_torch_random(random_before)
        raise
    return tally


def _narrowing(run: Run, act: Callable[[], T], *, when: str) -> T:
    """Do it, on an ever lower rung for as long as memory runs out. Raises what the lowest one raised."""
    while True:
        try:
            return act()
        except Exception as error:
            if not is_out_of_memory(error) or run.layout is run.rungs[-1]:
                raise
            traceback.print_exc()
        free_memory.free()
        wider = run.layout
        run.state.memory_halvings += 1
        fused_lora.drop_resident_weights(run.adapted)
        keep_activations(run.adapted, kept=not run.layout.checkpointing)
        change = fallback.difference(wider, run.layout)
        run.say(f"out of memory {when}: {change}, the result is the same mathematically", "warn")


def _evaluate(run: Run) -> None:
    """Score the adapter so far; remember the best one where early stopping will want it."""
    state = run.state
    scored = _score(run, adapter=True)
    score, run.latest = scored.mean, (state.step, scored)
    state.evaluation_due = False
    if state.best_loss is None or score.loss < state.best_loss:
        state.best_loss, state.best_step, state.worse_evaluations = score.loss, state.step, 0
        if run.recipe.early_stopping is not None:
            run.best = adapter_weights.adapter_tensors(run.adapted)
    else:
        state.worse_evaluations += 1
    _record(
        run,
        Metrics(
            step=state.step,
            total_steps=run.recipe.total_steps,
            valid_loss=score.loss,
            valid_mean_token_accuracy=score.token_accuracy,
            full_valid_loss=score.loss,
            full_valid_mean_token_accuracy=score.token_accuracy,
            valid_reward_accuracy=score.reward_accuracy,
            valid_reward_margin=score.reward_margin,
        ),
    )
    if _patience_is_spent(run):
        run.say(f"stopping early at step {state.step}: no improvement in {state.worse_evaluations} evaluations")


def _is_trained(run: Run) -> bool:
    return run.state.step >= run.recipe.total_steps or _patience_is_spent(run)


def _patience_is_spent(run: Run) -> bool:
    return run.recipe.early_stopping is not None and run.state.worse_evaluations >= run.recipe.early_stopping


def _save(run: Run) -> None:
    """A checkpoint of this step, unless one is there already or nothing was trained.

    A full disk costs the checkpoint and not the run: the last good one counts until the next is due.
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
            run.say(f"no checkpoint at step {run.state.step}, the last good one is kept: {error}", "warn")
        run.disk_is_full = True
        return
    run.saved_step, run.disk_is_full = run.state.step, False
    run.emit(
        CheckpointSaved(
            job=run.command.job, step=run.state.step, path=str(folder), metrics=checkpoint.latest(run.state)
        )
    )


def _score(run: Run, *, adapter: bool) -> RowScores:
    def act() -> RowScores:
        return evaluate.score(
            run.base,
            run.adapted,
            run.rows.heldout,
            run.recipe,
            adapter=adapter,
            layout=run.layout,
            start=run.start,
            stopping=run.stopping,
        )

    scored = _narrowing(run, act, when=f"in the evaluation after step {run.state.step}")
    if math.isfinite(scored.mean.loss):
        return scored
    if adapter:
        raise _diverged(f"after step {run.state.step}: loss {scored.mean.loss} on the held-out rows")
    raise TrainingFailed(
        f"the base model itself has loss {scored.mean.loss} on the held-out rows: nothing can be learned from it",
        code="unsupported_base_model",
        param="model",
        hint="choose another base or quantization; a NaN or an overflow comes from its weights",
    )


def _diverged(where: str) -> TrainingFailed:
    return TrainingFailed(
        f"the loss diverged {where}",
        code="diverged",
        param="hyperparameters.learning_rate_multiplier",
        hint="lower learning_rate_multiplier, to a third for instance",
    )


def _record(run: Run, metrics: Metrics) -> None:
    run.state.metrics.append(metrics)
    run.emit(Measured(job=run.command.job, metrics=metrics))


def _report(run: Run, encoder: Encoder, after: RowScores) -> Report:
    state = run.state
    assert state.base is not None
    outset = None
    if state.start is not None:
        outset = RowScores(state.start, np.array(state.start_nats, np.float32), after.weights)
    kept = state.best_step if run.best is not None else state.step
    found = report.make(
        run.base,
        run.adapted,
        run.recipe,
        run.rows,
        before=RowScores(state.base, np.array(state.base_nats, np.float32), after.weights),
        outset=outset,
        after=after,
        samples=_samples(run, encoder),
        steps=state.step,
        kept_step=state.step if kept is None else kept,
        trained_tokens=state.trained_tokens,
        seconds=state.seconds,
        fit=measured(run.account, run.base.device, run.rows.train, run.recipe, run.layout),
    )
    run.say(f"held-out loss {found.base.loss:.4f} → {found.tuned.loss:.4f}: {found.change.verdict.value}")
    if found.start is not None and found.start_change is not None:
        verdict = found.start_change.verdict.value
        run.say(f"from {found.start.loss:.4f} of the adapter that it started from: {verdict}")
    return found


def _samples(run: Run, encoder: Encoder) -> list[Sample]:
    """None, said aloud, where they cannot be written: a run that is trained and scored must not end for them."""
    try:
        answers = [row.documents[0] for row in run.rows.heldout]
        if run.recipe.labels is not None:
            return samples.classified(run.base, run.adapted, answers, encoder, labels=run.recipe.labels)
        return samples.compare(run.base, run.adapted, answers, encoder, layout=run.layout, stopping=run.stopping)
    except Interrupted:
        raise
    except Exception as error:
        traceback.print_exc()
        memory = is_out_of_memory(error)
        reason = "out of memory while they were written" if memory else f"{type(error).__name__}: {error}"
    free_memory.free()
    run.say(f"no samples in the report: {reason}", "warn")
    return []


def _say(emit: Emit, job: str, message: str, level: str) -> None:
    emit(Notice.model_validate({"job": job, "level": level, "message": message}))
