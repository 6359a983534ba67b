"""One optimizer step: forward and backward over its micro-batches, gradient clipping, AdamW.

Owns: the gradient of a step. The loss sum of every micro-batch is divided by the weight of the whole step, which is its
number of trained tokens (of pairs in DPO, of rows in classification). So the gradient does not depend on how the step
is split into micro-batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from shared.errors import TrainingFailed
from shared.schemas.results import Metrics
from worker.trainer import methods
from worker.trainer.data import dataset
from worker.trainer.data.encoding import Row
from worker.trainer.forward import threads
from worker.trainer.forward.batches import Batch, trained_tokens
from worker.trainer.methods import Loss, Tally
from worker.trainer.model.base import trainable
from worker.trainer.planning.recipe import learning_rate_at
from worker.trainer.training import optimizer, random_state
from worker.trainer.training.run import Run, with_fallback


def optimizer_step(run: Run) -> None:
    """Train on the next `batch_size` examples and report the step's metrics.

    Raises TrainingFailed if the loss or the gradient is not finite, and Interrupted if a stop is requested. In both
    cases no weight has changed.
    """
    recipe, state = run.recipe, run.state
    started = time.perf_counter()
    examples = dataset.step_examples(run.rows.train, state.step, batch_size=recipe.batch_size, seed=recipe.seed)
    score = with_fallback(run, lambda: accumulate(run, examples), when=f"at step {state.step + 1}").score()
    rate = learning_rate_at(recipe, state.step)
    optimizer.set_rate(run.optimizer, rate)
    norm = torch.nn.utils.clip_grad_norm_(trainable(run.adapted).values(), recipe.max_grad_norm).item()
    if not (math.isfinite(score.loss) and math.isfinite(norm)):
        raise diverged(f"at step {state.step + 1}: loss {score.loss}, gradient norm {norm}")
    run.optimizer.step()
    run.optimizer.zero_grad()
    seconds, tokens = time.perf_counter() - started, trained_tokens(examples)
    state.step += 1
    state.trained_tokens += tokens
    state.seconds += seconds
    # Early stopping keeps the best of the scored steps, so the last step must be scored too.
    last = recipe.early_stopping is not None and state.step == recipe.total_steps
    state.evaluation_due = recipe.eval_every is not None and (state.step % recipe.eval_every == 0 or last)
    run.record(
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
        )
    )


def accumulate(run: Run, examples: list[Row], *, turn: int | None = None) -> Tally:
    """Add the gradient of the examples' mean loss to the parameters' `.grad`, one micro-batch after the other.

    `turn` (from 0) selects only the micro-batches that are in memory at the same time then. After any error, including
    Interrupted, gradients are cleared and random generators are restored.
    """
    layout, weight, tally = run.layout, methods.weight(examples, run.recipe), Tally()
    parameters = list(trainable(run.adapted).values())

    def gradients(batch: Batch) -> tuple[Loss, Sequence[torch.Tensor | None]]:
        with run.base.precision():
            loss = methods.loss(run.adapted, batch.to(run.base.device), layout, run.recipe, start=run.start)
        return loss, torch.autograd.grad(loss.sums.sum() / weight, parameters, allow_unused=True)

    random_before = random_state.torch_random()
    try:
        # Threads may finish in any order, but rounded sums depend on the order of addition: add in that of the batches.
        batches = layout.split(examples, turn)
        for loss, found in threads.run_in_order(gradients, batches, layout.lanes, before=run.check_stop):
            for parameter, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
            tally.add(loss)
            del loss, found, gradient  # free this memory before the next micro-batch runs, not after it
    except Exception:
        run.optimizer.zero_grad()
        random_state.set_torch_random(random_before)
        raise
    return tally


def diverged(where: str) -> TrainingFailed:
    """The error for a loss or a gradient that is not finite."""
    return TrainingFailed(
        f"the loss diverged {where}",
        code="diverged",
        param="hyperparameters.learning_rate_multiplier",
        hint="lower learning_rate_multiplier, to a third for instance",
    )
