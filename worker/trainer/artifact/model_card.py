"""Write the model card of an adapter or a full model: README.md with the front matter that model hubs read.

Owns: the text on how the model was made, how it was evaluated, and how to use it. Must contain only facts of this run,
and nothing about the machine.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from shared.schemas.requests import ExportName
from shared.schemas.results import Metrics, Recipe, Report
from worker.trainer.artifact.vllm import max_lora_rank
from worker.trainer.model import adapter_weights
from worker.trainer.protocol import Task

BARS = "▁▂▃▄▅▆▇█"
POINTS = 60
MOST_EVALUATIONS = 20
MOST_LABELS = 20

_HELDOUT = {
    "validation_file": "the rows of a validation file",
    "training_file_carved": "rows of the training file that were held out of training",
    "training_file": "the training rows themselves, because there were too few to hold any out: this is memorization",
}


def text(task: Task, recipe: Recipe, report: Report, metrics: Sequence[Metrics]) -> str:
    """The whole card, in Markdown."""
    sections = (
        _front_matter(task, recipe),
        f"# {task.base_name}, fine-tuned\n" if recipe.full_finetuning else f"# LoRA adapter for {task.base_name}\n",
        _origin(task),
        _result(report, recipe) if recipe.labels is None else _labels_result(recipe.labels, report),
        _curve(metrics),
        _recipe(recipe, report),
        _limits(report),
        _use(task, recipe),
        _exports(task),
    )
    return "\n".join(section for section in sections if section)


def sparkline(values: Sequence[float]) -> str:
    """Draw values as at most POINTS bars, each the mean of consecutive values, scaled from lowest to highest mean."""
    size = max(1, -(-len(values) // POINTS))
    means = [sum(part) / len(part) for start in range(0, len(values), size) if (part := values[start : start + size])]
    low, span = min(means), max(means) - min(means)
    return "".join(BARS[round((mean - low) / span * (len(BARS) - 1)) if span else 0] for mean in means)


def _front_matter(task: Task, recipe: Recipe) -> str:
    full = recipe.full_finetuning
    data = ModelCardData(
        base_model=task.base_name,
        library_name="transformers" if full else "peft",
        license=task.base_license,
        pipeline_tag="text-generation" if recipe.labels is None else "text-classification",
        tags=["milliner"] if full else ["lora", "milliner"],
        base_model_relation="finetune" if full else "adapter",
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _origin(task: Task) -> str:
    files = {"training data": task.training_file, "validation data": task.validation_file}
    rows = [("base", task.base_name), ("revision", task.base_revision)]
    if task.start_from is not None and task.start_name is not None:
        weights = _sha256(Path(task.start_from) / adapter_weights.ADAPTER)
        rows.append(("training started from", f"{task.start_name}, weights SHA-256 `{weights}`"))
    rows += [(name, f"SHA-256 `{_sha256(Path(path))}`") for name, path in files.items() if path is not None]
    return _table(("made from", ""), rows)


def _result(report: Report, recipe: Recipe) -> str:
    loss, gained = "loss (nats a token)", ""
    if (share := report.tuned.reward_accuracy) is not None:
        loss = "loss (DPO, nats a pair)"
        gained = f"In {share:.1%} of the pairs, the chosen answer gained more likelihood than the rejected one. "
    tuned = "fine-tuned" if recipe.full_finetuning else "with this adapter"
    rows = [
        (name, f"{score.loss:.4f}", f"{score.token_accuracy:.1%}")
        for name, score in (
            ("base", report.base),
            ("with the adapter that training started from", report.start),
            (tuned, report.tuned),
        )
        if score is not None
    ]
    return (
        f"## Result\n\n{_table(('', loss, 'token accuracy'), rows)}\n{gained}"
        f"Measured on {report.base.tokens:,} trained tokens of {_HELDOUT[report.heldout_source]}. "
        f"All with the base in {report.quantization.value}, computed in {report.compute_dtype}.\n"
    )


def _labels_result(labels: Sequence[str], report: Report) -> str:
    rows = [
        (name, f"{score.loss:.4f}", f"{score.token_accuracy:.1%}", f"{score.macro_f1 or 0:.3f}")
        for name, score in (("base", report.base), ("with this adapter", report.tuned))
    ]
    if (most := report.majority) is not None:
        rows.append((f"always “{_cell(most.label)}”", "", f"{most.accuracy:.1%}", ""))
    return (
        f"## Result\n\n{_table(('', 'loss (nats a row)', 'accuracy', 'macro F1'), rows)}\n"
        f"Measured on {report.base.tokens:,} rows: {_HELDOUT[report.heldout_source]}. "
        f"Both with the base in {report.quantization.value}, computed in {report.compute_dtype}.\n\n"
        f"{len(labels)} labels: {', '.join(f'“{_cell(label)}”' for label in labels[:MOST_LABELS])}"
        f"{', …' if len(labels) > MOST_LABELS else ''}. `config.json` lists all of them.\n"
    )


def _curve(metrics: Sequence[Metrics]) -> str:
    losses = [m.train_loss for m in metrics if m.train_loss is not None]
    if not losses:
        return ""
    parts = [f"## Loss\n\n`{sparkline(losses)}` training loss, from {losses[0]:.3f} to {losses[-1]:.3f}\n"]
    evaluations = [(m.step, m.full_valid_loss) for m in metrics if m.full_valid_loss is not None]
    if evaluations:
        every = -(-len(evaluations) // MOST_EVALUATIONS)
        shown = [*evaluations[:-1:every], evaluations[-1]]
        parts.append(_table(("step", "held-out loss"), [(f"{step}", f"{loss:.4f}") for step, loss in shown]))
    return "\n".join(parts)


def _recipe(recipe: Recipe, report: Report) -> str:
    kept = f"; the adapter is that of step {report.kept_step:,}" if report.kept_step not in (None, report.steps) else ""
    plus = f" ({recipe.loraplus_lr_ratio:g} times that for B: LoRA+)" if recipe.loraplus_lr_ratio is not None else ""
    rows = [
        *_shape(recipe),
        ("parameters", f"{report.trainable_parameters:,} trained, {report.total_parameters:,} in total"),
        ("quantization of the base", recipe.quantization.value),
        ("method", recipe.method if recipe.beta is None else f"{recipe.method}, beta {recipe.beta:g}"),
        ("steps", f"{report.steps:,} of {recipe.batch_size} examples, at most {recipe.n_epochs} epochs{kept}"),
        ("trained tokens", f"{report.trained_tokens:,}"),
        ("learning rate", f"{recipe.learning_rate:.3g}{plus}, {recipe.schedule}, {recipe.warmup_steps} warm-up steps"),
        ("optimizer", f"AdamW, weight decay {recipe.weight_decay:g}, gradients clipped at {recipe.max_grad_norm:g}"),
        ("longest row", f"{recipe.max_length:,} tokens"),
        ("seed", str(recipe.seed)),
        ("time", f"{report.train_seconds:,.0f} s in optimizer steps"),
    ]
    return "## Recipe\n\n" + _table(("", ""), rows)


def _shape(recipe: Recipe) -> list[tuple[str, str]]:
    if recipe.full_finetuning:
        return [("trained", "all weights, in fp32")]
    targets = recipe.target_modules if isinstance(recipe.target_modules, str) else ", ".join(recipe.target_modules)
    kind = " ".join(name for name, on in (("rsLoRA", recipe.use_rslora), ("DoRA", recipe.use_dora)) if on)
    lora = f"r {recipe.r}, alpha {recipe.alpha:g}, dropout {recipe.dropout:g}{', ' + kind if kind else ''}"
    return [("LoRA", lora), ("target modules", targets)]


def _limits(report: Report) -> str:
    quantized = (
        f"- The base was quantized to {report.quantization.value}: in another quantization, scores differ a little.\n"
        if report.quantization.value != "none"
        else ""
    )
    accuracy = "token accuracy" if report.majority is None else "accuracy"
    return (
        "## Limits\n\n"
        f"- It was measured only by loss and {accuracy}, on rows like those it was trained on.\n"
        "- What the base's own card says about bias, safety and licence applies here too.\n"
        f"{quantized}"
        "- `manifest.json` has the hash of each file, and the proof: what was measured on these very files.\n"
    )


def _usage(task: Task, recipe: Recipe) -> str:
    return f"""## Use

`DIR` is the folder of this file. With [PEFT](https://huggingface.co/docs/peft):

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("DIR")
base = AutoModelForCausalLM.from_pretrained("{task.base_name}"{_revision(task)})
model = PeftModel.from_pretrained(base, "DIR")
```

With [vLLM](https://docs.vllm.ai) (`manifest.json` says under `proof.vllm` whether it supports this adapter):

```bash
vllm serve {task.base_name} --enable-lora --max-lora-rank {max_lora_rank(recipe.r)} --lora-modules hat=DIR
```

With [llama.cpp](https://github.com/ggml-org/llama.cpp) and a GGUF file of the base:

```bash
python convert_lora_to_gguf.py DIR --base BASE_DIR --outfile hat.gguf
llama-cli -m base.gguf --lora hat.gguf
```
"""


def _exports(task: Task) -> str:
    """How to use each requested export. Whether it could be made is not known yet."""
    commands = {
        ExportName.MERGED: "vllm serve DIR/exports/merged",
        ExportName.MERGED_DEQUANTIZED: "vllm serve DIR/exports/merged_dequantized",
        ExportName.GGUF_ADAPTER: "llama-cli -m base.gguf --lora DIR/exports/gguf_adapter/adapter.gguf",
        ExportName.GGUF_MERGED: "llama-cli -m DIR/exports/gguf_merged/model.gguf",
    }
    if not task.trainer.exports:
        return ""
    lines = "\n".join(commands[name] for name in task.trainer.exports)
    return f"""## Exports

Other formats of this adapter. Each was loaded again and compared before it was published. `manifest.json` has the
difference in loss and logits, or the reason why an export is missing, under `exports`. `merged` adds the adapter to the
base's original weights, `merged_dequantized` to the quantized weights of the training. Both are full models that do not
need this adapter.

```bash
{lines}
```
"""


def _use(task: Task, recipe: Recipe) -> str:
    if recipe.full_finetuning:
        return _model_usage()
    return _usage(task, recipe) if recipe.labels is None else _labels_usage(task)


def _model_usage() -> str:
    return """## Use

`DIR` is the folder of this file. It contains the full model:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("DIR")
model = AutoModelForCausalLM.from_pretrained("DIR")
```

With [vLLM](https://docs.vllm.ai) (`manifest.json` says under `proof.vllm` whether it supports this model):

```bash
vllm serve DIR
```

With [llama.cpp](https://github.com/ggml-org/llama.cpp):

```bash
python convert_hf_to_gguf.py DIR --outfile tuned.gguf
llama-cli -m tuned.gguf
```
"""


def _labels_usage(task: Task) -> str:
    """How to use a classifier. If the base's files have a head of another size, transformers must ignore that one."""
    config = json.loads((Path(task.base_dir) / "config.json").read_text(encoding="utf-8"))
    has_head = any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or ())
    return f"""## Use

`DIR` is the folder of this file. Its `config.json` names the labels. The adapter contains the head, in fp32. With
[PEFT](https://huggingface.co/docs/peft):

```python
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

config = AutoConfig.from_pretrained("DIR")
tokenizer = AutoTokenizer.from_pretrained("DIR")
tokenizer.pad_token_id = config.pad_token_id
base = AutoModelForSequenceClassification.from_pretrained(
    "{task.base_name}"{_revision(task)}, config=config, dtype=torch.float32{", ignore_mismatched_sizes=True" * has_head}
)
model = PeftModel.from_pretrained(base, "DIR").eval()
inputs = tokenizer("a text", return_tensors="pt")
with torch.no_grad():
    print(config.id2label[model(**inputs).logits.argmax().item()])
```

vLLM cannot serve an adapter with a head (`proof.vllm` in `manifest.json`).
"""


def _revision(task: Task) -> str:
    """The `revision` argument, if the revision is a commit hash, which model hubs know."""
    return f', revision="{task.base_revision}"' if re.fullmatch("[0-9a-f]{40}", task.base_revision) else ""


def _cell(text: str) -> str:
    """Text of a dataset, escaped for one cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
