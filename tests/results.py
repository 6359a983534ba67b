"""The smallest recipe, plan, report and proof that the schemas accept, for tests that do not check their content."""

from __future__ import annotations

from typing import Any

from shared.schemas.results import FullFineTuning, LossChange, Plan, Recipe, Report, Score, Verdict

RECIPE = Recipe(
    method="supervised", beta=None,
    n_epochs=1, batch_size=1, learning_rate_multiplier=1, learning_rate=1e-3, schedule="cosine", warmup_steps=1,
    total_steps=2, weight_decay=0, max_grad_norm=1, r=8, alpha=16, dropout=0, target_modules="all-linear",
    use_rslora=False, use_dora=False, quantization="nf4", max_length=64, packing=True, micro_batch=1, save_every=1,
    eval_every=None, early_stopping=None, seed=0,
)  # fmt: skip
PLAN = Plan(
    rows=1, heldout_rows=0, tokens=1, trained_tokens=1, longest_row=1, truncated_rows=0, dropped_rows=0, warnings=[],
    recipe=RECIPE,
)  # fmt: skip
SCORE = Score(loss=1.0, token_accuracy=0.5, tokens=1)
CHANGE = LossChange(loss=0.0, low=None, high=None, rows=1, resamples=0, verdict=Verdict.UNKNOWN, caveats=[])
REPORT = Report(
    base=SCORE, tuned=SCORE, change=CHANGE, samples=[], heldout_source="training_file", heldout_lines=[1],
    quantization="nf4", compute_dtype="bfloat16", steps=1, trained_tokens=1, trainable_parameters=1, total_parameters=1,
    adapter_bytes=1, base_bytes=1, base_fp32_bytes=1, train_seconds=1, tokens_per_second=1, peak_memory_bytes=1,
    full_finetuning=FullFineTuning(weights_bytes=1, gradients_bytes=1, optimizer_bytes=2, total_bytes=4),
)  # fmt: skip
PROOF: dict[str, Any] = {
    "base": REPORT.base.model_dump(), "tuned": REPORT.tuned.model_dump(), "base_deviation": 0, "tuned_deviation": 0,
    "tolerance": 0, "max_logit_difference": 1, "start_logit_difference": None, "tensors": 1, "tokenizer_sha256": "",
    "vllm": {"servable": True, "max_lora_rank": 8, "reasons": []},
}  # fmt: skip
