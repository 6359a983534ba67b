"""Scores on the held-out rows: the base before training, the adapter at each evaluation, early stopping.

Owns: when to score and which adapter is kept. Must not compute scores itself: `evaluation/evaluate.py` does.
"""

from __future__ import annotations

import math

from shared.errors import TrainingFailed
from shared.schemas.results import Metrics
from worker.trainer.evaluation import evaluate
from worker.trainer.evaluation.evaluate import RowScores
from worker.trainer.model import adapter_weights, initial_adapter
from worker.trainer.training.run import Run, with_fallback
from worker.trainer.training.step import diverged


def score_before_training(run: Run) -> None:
    """Score the base, and the adapter from which training starts, unless the checkpoint has these scores.

    A run whose steps are all done scores them again, because its previous attempt may have failed the proof due to a
    wrong score in the checkpoint.
    """
    state, rows = run.state, len(run.rows.heldout)
    if state.base is None or len(state.base_nats) != rows or is_trained(run):
        scored = score(run, adapter=False)
        state.base, state.base_nats = scored.mean, scored.nats.tolist()
        untrained = " (its head is untrained, so this is chance)" if run.base.uninitialized else ""
        run.log(f"the base alone: loss {state.base.loss:.4f} on {rows} held-out rows{untrained}")
    if run.start is not None and (state.start is None or len(state.start_nats) != rows or is_trained(run)):
        with initial_adapter.applied(run.adapted, run.start):
            scored = score(run, adapter=True)
        state.start, state.start_nats = scored.mean, scored.nats.tolist()
        run.log(f"the adapter that training starts from: loss {state.start.loss:.4f}")


def evaluate_step(run: Run) -> None:
    """Score the current adapter and report the result; with early stopping, keep a copy of the best adapter so far."""
    state = run.state
    scored = score(run, adapter=True)
    mean, run.latest = scored.mean, (state.step, scored)
    state.evaluation_due = False
    if state.best_loss is None or mean.loss < state.best_loss:
        state.best_loss, state.best_step, state.worse_evaluations = mean.loss, state.step, 0
        if run.recipe.early_stopping is not None:
            run.best = adapter_weights.adapter_tensors(run.adapted)
    else:
        state.worse_evaluations += 1
    run.record(
        Metrics(
            step=state.step,
            total_steps=run.recipe.total_steps,
            valid_loss=mean.loss,
            valid_mean_token_accuracy=mean.token_accuracy,
            full_valid_loss=mean.loss,
            full_valid_mean_token_accuracy=mean.token_accuracy,
            valid_reward_accuracy=mean.reward_accuracy,
            valid_reward_margin=mean.reward_margin,
        )
    )
    if _stops_early(run):
        run.log(f"stopping early at step {state.step}: no improvement in {state.worse_evaluations} evaluations")


def final_score(run: Run) -> RowScores:
    """Return the score of the adapter to publish. With early stopping, the best adapter is loaded first."""
    if run.best is not None and run.state.best_step != run.state.step:
        adapter_weights.set_adapter(run.adapted, run.best)
        run.latest = None
        run.log(f"keeping the adapter of step {run.state.best_step}, which scored best")
    if run.latest is not None and run.latest[0] == run.state.step:
        return run.latest[1]
    return score(run, adapter=True)


def score(run: Run, *, adapter: bool) -> RowScores:
    """Score the held-out rows, with the adapter or by the base alone.

    Raises TrainingFailed if the loss is not finite, and Interrupted if a stop is requested.
    """

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

    scored = with_fallback(run, act, when=f"in the evaluation after step {run.state.step}")
    if math.isfinite(scored.mean.loss):
        return scored
    if adapter:
        raise diverged(f"after step {run.state.step}: loss {scored.mean.loss} on the held-out rows")
    raise TrainingFailed(
        f"the base model itself has loss {scored.mean.loss} on the held-out rows, so it cannot be trained",
        code="unsupported_base_model",
        param="model",
        hint="choose another base or quantization: this base's weights cause a NaN or an overflow",
    )


def is_trained(run: Run) -> bool:
    """Whether training is over: the last step is done, or early stopping applies."""
    return run.state.step >= run.recipe.total_steps or _stops_early(run)


def _stops_early(run: Run) -> bool:
    return run.recipe.early_stopping is not None and run.state.worse_evaluations >= run.recipe.early_stopping
