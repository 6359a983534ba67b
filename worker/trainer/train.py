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
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from peft import PeftModel
from safetensors import SafetensorError

from shared.errors import TrainingFailed
from shared.protocol import CheckpointSaved, Done, Measured, Notice, PhaseEntered, Stopped, Train, TrainerEvent
from shared.schemas import Phase
from shared.training import Metrics, Recipe, Report, Sample
from worker.trainer import (
    adapter,
    checkpoint,
    data,
    evaluate,
    ladder,
    lora,
    memory,
    methods,
    model,
    packing,
    rehearsal,
    report,
    samples,
    selftest,
)
from worker.trainer.batches import batches, trained_tokens
from worker.trainer.checkpoint import RunState, Tensors
from worker.trainer.encoding import Encoder, Row
from worker.trainer.evaluate import RowScores
from worker.trainer.exhaustion import is_disk_full, is_out_of_memory
from worker.trainer.likelihood import Layout
from worker.trainer.methods import Tally
from worker.trainer.model import Base
from worker.trainer.prepare import Rows, usable
from worker.trainer.recipe import learning_rate_at

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
    rows: Rows
    base: Base
    adapted: PeftModel
    optimizer: torch.optim.Optimizer
    rungs: list[Layout]
    state: RunState
    account: memory.Account
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
    rows = usable(data.load(task, encoder, tick=tick), recipe.max_length, seed=recipe.seed)
    emit(PhaseEntered(job=job, phase=Phase.LOADING))
    memory.begin()
    base = load_base()
    layout, warnings = selftest.layout(
        base,
        rows.train,
        packing=recipe.packing,
        micro_batch=recipe.micro_batch,
        checkpointing=recipe.gradient_checkpointing,
        pad=encoder.eos,
    )
    for warning in warnings:
        _say(emit, job, warning, "warn")
    random.seed(recipe.seed)
    np.random.seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    adapted = model.put_on(base, recipe)
    try:
        run = _start(command, rows, base, adapted, layout, emit=emit, stopping=stopping)
        _finish(run, encoder)
    finally:
        model.take_off(adapted)


def _start(
    command: Train,
    rows: Rows,
    base: Base,
    adapted: PeftModel,
    layout: Layout,
    *,
    emit: Emit,
    stopping: Callable[[], bool],
) -> Run:
    """The point before the next optimizer step, which is step 0 or where a checkpoint was left."""
    recipe = command.recipe
    optimizer = torch.optim.AdamW(
        model.trainable(adapted).values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    state, best = RunState(recipe=recipe), None
    if command.resume_from is not None:
        state, best = checkpoint.load(Path(command.resume_from), adapted, optimizer, recipe)
    rungs = ladder.rungs(layout, base, longest=max(map(len, rows.train)))
    state.memory_halvings = min(max(state.memory_halvings, command.memory_halvings), len(rungs) - 1)
    if state.memory_halvings:
        lora.let_go(adapted)
    account = memory.open_account(base, command.task, from_step=state.step)
    now = time.monotonic()
    run = Run(command, emit, stopping, rows, base, adapted, optimizer, rungs, state, account, best, state.step, now)
    model.keep_activations(adapted, kept=not run.layout.checkpointing)
    _say_decisions(run)
    return run


def _finish(run: Run, encoder: Encoder) -> None:
    """Train, and leave an adapter folder; or a checkpoint, where a stop is asked for."""
    job, folder = run.command.job, Path(run.command.work_dir) / "adapter"
    try:
        found = _report(run, encoder, _loop(run))
        adapter.write(
            folder,
            run.adapted,
            encoder.tokenizer,
            task=run.command.task,
            recipe=run.recipe,
            report=found,
            metrics=run.state.metrics,
        )
        run.emit(Done(job=job, path=str(folder), report=found, memory_halvings=run.state.memory_halvings))
    except evaluate.Interrupted:
        _save(run)
        run.emit(Stopped(job=job, step=run.state.step))


def _loop(run: Run) -> RowScores:
    """Train to the end and score the result. Raises Interrupted when a stop is asked for."""
    run.emit(PhaseEntered(job=run.command.job, phase=Phase.EVALUATING))
    # Once more where only the end is left to do: the proof may have found that the score in the checkpoint is wrong.
    if run.state.base is None or len(run.state.base_nats) != len(run.rows.heldout) or _is_trained(run):
        scored = _score(run, adapter=False)
        run.state.base, run.state.base_nats = scored.mean, scored.nats.tolist()
        run.say(f"the base alone: loss {run.state.base.loss:.4f} on {len(run.rows.heldout)} held-out rows")
    run.emit(PhaseEntered(job=run.command.job, phase=Phase.TRAINING))
    _rehearse(run)
    while True:
        if run.state.evaluation_due:
            _evaluate(run)
        if run.stopping():
            raise evaluate.Interrupted
        trained = _is_trained(run)
        overdue = time.monotonic() - run.save_tried_at >= SAVE_SECONDS
        if trained or overdue or run.state.step % run.recipe.save_every == 0:
            _save(run)  # the last step too: what comes after it may be interrupted, and costs no step then
        if trained:
            break
        _step(run)
    run.emit(PhaseEntered(job=run.command.job, phase=Phase.EVALUATING))
    ladder.free()  # what a CPU's heap has kept of activations would be added to what comes now
    if run.best is not None and run.state.best_step != run.state.step:
        checkpoint.set_adapter(run.adapted, run.best)
        run.latest = None
        run.say(f"step {run.state.best_step} scored best and is the one that is kept")
    if run.latest is not None and run.latest[0] == run.state.step:
        return run.latest[1]
    return _score(run, adapter=True)


def _rehearse(run: Run) -> None:
    """The heaviest micro-batch before all others, and no trace of it: memory that is short is short now, not in hours.

    Left out where it is not worth its time. Asked to stop, raises Interrupted.
    """
    rows, recipe = run.rows.train, run.recipe
    if rehearsal.heaviest(rows, recipe, run.layout, step=run.state.step) is None:
        return
    random_before = checkpoint.torch_random()

    def act() -> packing.Heaviest | None:
        found = rehearsal.heaviest(rows, recipe, run.layout, step=run.state.step)
        if found is not None:
            examples = data.step_examples(rows, found.step, batch_size=recipe.batch_size, seed=recipe.seed)
            with rehearsal.as_after_steps(run.adapted, run.optimizer):
                _accumulate(run, examples, part=found.part)
        return found

    tried = _narrowing(run, act, when="in the trial of the longest rows")
    run.optimizer.zero_grad()
    checkpoint.set_torch_random(random_before)
    run.account.rehearsed_bytes = memory.peak(run.base.device)
    run.say(rehearsal.told(tried, run.account))


def _step(run: Run) -> None:
    """One optimizer step over `batch_size` examples. Asked to stop, raises Interrupted with everything as it was."""
    recipe, state = run.recipe, run.state
    started = time.perf_counter()
    examples = data.step_examples(run.rows.train, state.step, batch_size=recipe.batch_size, seed=recipe.seed)
    score = _narrowing(run, lambda: _accumulate(run, examples), when=f"at step {state.step + 1}").score()
    rate = learning_rate_at(recipe, state.step)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    norm = torch.nn.utils.clip_grad_norm_(model.trainable(run.adapted).values(), recipe.max_grad_norm).item()
    if not (math.isfinite(score.loss) and math.isfinite(norm)):
        raise _diverged(f"at step {state.step + 1}: loss {score.loss}, gradient norm {norm}")
    run.optimizer.step()
    run.optimizer.zero_grad()
    seconds, tokens = time.perf_counter() - started, trained_tokens(examples)
    state.step += 1
    state.trained_tokens += tokens
    state.seconds += seconds
    state.evaluation_due = bool(recipe.eval_every) and state.step % (recipe.eval_every or 1) == 0
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


def _accumulate(run: Run, examples: list[Row], *, part: int | None = None) -> Tally:
    """The gradient of the mean loss of the whole step, in as many micro-batches as the layout takes.

    Of these, only the `part`-th, if one is named. An error, or Interrupted, leaves no gradient and no random number
    drawn.
    """
    layout, weight, tally = run.layout, methods.weight(examples, run.recipe), Tally()
    random_before = checkpoint.torch_random()
    try:
        cut = batches(examples, packing=layout.packing, micro_batch=layout.micro_batch, pad=layout.pad)
        for batch in cut if part is None else islice(cut, part, part + 1):
            if run.stopping():
                raise evaluate.Interrupted
            with run.base.precision():
                loss = methods.loss(run.adapted, batch.to(run.base.device), layout, run.recipe)
            # Every micro-batch is divided by the weight of the whole step, so splitting does not change the gradient.
            torch.autograd.backward(loss.sums.sum() / weight)
            tally.add(loss)
    except Exception:
        run.optimizer.zero_grad()
        checkpoint.set_torch_random(random_before)
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
        ladder.free()
        wider = run.layout
        run.state.memory_halvings += 1
        lora.let_go(run.adapted)
        model.keep_activations(run.adapted, kept=not run.layout.checkpointing)
        change = ladder.difference(wider, run.layout)
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
            run.best = checkpoint.adapter_tensors(run.adapted)
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
            job=run.command.job, step=run.state.step, path=str(folder), metrics=_latest(run.state, run.recipe)
        )
    )


def _latest(state: RunState, recipe: Recipe) -> Metrics:
    """What is known at this step, the step's own line and its evaluation in one."""
    merged = Metrics(step=state.step, total_steps=recipe.total_steps)
    for metrics in state.metrics[-2:]:
        if metrics.step == state.step:
            merged = merged.model_copy(update=metrics.model_dump(exclude_none=True))
    return merged


def _score(run: Run, *, adapter: bool) -> RowScores:
    def act() -> RowScores:
        return evaluate.score(
            run.base,
            run.adapted,
            run.rows.heldout,
            run.recipe,
            adapter=adapter,
            layout=run.layout,
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
    found = report.make(
        run.base,
        run.adapted,
        run.recipe,
        run.rows,
        before=RowScores(state.base, np.array(state.base_nats, np.float32), after.weights),
        after=after,
        samples=_samples(run, encoder),
        steps=state.step,
        trained_tokens=state.trained_tokens,
        seconds=state.seconds,
        fit=memory.measured(run.account, run.base.device, run.rows.train, run.recipe, run.layout),
    )
    run.say(f"held-out loss {found.base.loss:.4f} → {found.tuned.loss:.4f}: {found.change.verdict.value}")
    return found


def _samples(run: Run, encoder: Encoder) -> list[Sample]:
    """None, said aloud, where they cannot be written: a run that is trained and scored must not end for them."""
    try:
        answers = [row.documents[0] for row in run.rows.heldout]
        return samples.compare(run.base, run.adapted, answers, encoder, layout=run.layout, stopping=run.stopping)
    except evaluate.Interrupted:
        raise
    except Exception as error:
        traceback.print_exc()
        memory = is_out_of_memory(error)
        reason = "out of memory while they were written" if memory else f"{type(error).__name__}: {error}"
    ladder.free()
    run.say(f"no samples in the report: {reason}", "warn")
    return []


def _say_decisions(run: Run) -> None:
    recipe, layout = run.recipe, run.layout
    trainable_parameters, total = run.adapted.get_nb_trainable_parameters()
    run.say(
        f"{len(run.rows.train)} rows train, {len(run.rows.heldout)} are held out ({run.rows.heldout_source}); "
        f"{recipe.total_steps} steps of {recipe.batch_size} examples over {recipe.n_epochs} epochs"
    )
    run.say(
        f"LoRA r={recipe.r} alpha={recipe.alpha:g} on {recipe.target_modules}: {trainable_parameters:,} of {total:,} "
        f"parameters; rate {recipe.learning_rate:.2e}, {recipe.schedule}, {recipe.warmup_steps} warm-up steps"
    )
    run.say(
        f"base in {recipe.quantization.value} on {run.base.device.type}, computing in "
        f"{str(run.base.compute_dtype).removeprefix('torch.')}; rows {'packed' if layout.packing else 'padded'}, "
        f"{layout.micro_batch} at a time, at most {recipe.max_length} tokens each"
    )
    if run.state.memory_halvings:
        run.say(f"memory ran out before: {ladder.difference(run.rungs[0], layout)}, the same mathematically")
    if run.state.step:
        run.say(f"going on from the checkpoint of step {run.state.step}")


def _say(emit: Emit, job: str, message: str, level: str) -> None:
    emit(Notice.model_validate({"job": job, "level": level, "message": message}))
