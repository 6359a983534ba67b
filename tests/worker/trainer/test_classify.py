"""Classifiers of each kind of base: they overfit, resume bit for bit, stand their proof, and stock peft loads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from shared.errors import TrainingFailed
from shared.protocol import CheckpointSaved, Done, Notice, Task, Verify
from shared.schemas import Quantization
from tests.tiny import tiny_base, tiny_encoder
from worker.trainer import classifier, data, evaluate, methods, model
from worker.trainer.encoding import Encoder
from worker.trainer.likelihood import Layout
from worker.trainer.prepare import prepare
from worker.trainer.verify import verify

from .conftest import MakeTask, Rows, WriteRows, adapter_bytes, recipe_of, run

#: model_type → the modules that are trained in full.
ENCODERS = {"bert": ["bert.pooler", "classifier"], "roberta": ["classifier"], "deberta-v2": ["classifier", "pooler"]}
HEADS = ENCODERS | {"llama": ["score"], "gpt2": ["score"]}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}
MakeBase = Callable[[str], str]


def hats(count: int) -> Rows:
    """Pairs whose second text tells the label, and whose lengths differ."""
    kinds = ("felt", "wool", "straw")
    return [
        {"text": f"hat {i} " * (1 + i % 3), "text_pair": f"it is {kinds[i % 3]}", "label": kinds[i % 3]}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> MakeBase:
    made: dict[str, str] = {}

    def make(kind: str) -> str:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            if kind in ENCODERS:
                tiny_encoder(folder, kind, **(RELATIVE if kind == "deberta-v2" else {}))
            else:
                tiny_base(folder, kind)
            made[kind] = str(folder)
        return made[kind]

    return make


def classification(task: MakeTask, rows: str, base: str, **fields: Any) -> Task:
    return task(rows, method="classification", base_dir=base, **fields)


# ---------------------------------------------------------------- whole runs


# peft 0.21 still asks for a name that transformers 5 has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", HEADS)
def test_a_classifier_is_trained_resumed_proven_and_loaded(
    kind: str, make_base: MakeBase, make_task: MakeTask, write_rows: WriteRows, tmp_path: Path
) -> None:
    base, rows = make_base(kind), hats(6)
    task = classification(
        make_task, write_rows(rows), base, quantization="nf4", hyperparameters={"n_epochs": 20, "batch_size": 3}
    )
    options: dict[str, Any] = {"eval_every": None, "learning_rate": 1e-2}
    observed = run(task, tmp_path / "whole", **options)
    [done] = observed.of(Done)
    found = done.report
    assert (found.tuned.token_accuracy, found.tuned.macro_f1, found.tuned.tokens) == (1.0, 1.0, 6)
    assert found.tuned.loss < 0.1 < found.base.loss
    assert found.majority is not None
    assert (found.majority.label, found.majority.accuracy) == ("felt", pytest.approx(1 / 3))
    assert [(sample.reference, sample.tuned.text) for sample in found.samples] == [
        (rows[sample.line - 1]["label"],) * 2 for sample in found.samples
    ]
    assert any("its score is chance" in caveat for caveat in found.change.caveats)
    assert any("rows to be classified are never packed" in notice.message for notice in observed.of(Notice))

    saved = run(task, tmp_path / "first", stop_at=9, **options).of(CheckpointSaved)[-1].path
    run(task, tmp_path / "second", resume_from=saved, **options)
    assert adapter_bytes(tmp_path / "second") == adapter_bytes(tmp_path / "whole")

    proof = verify(proven(task, done, **options), stopping=lambda: False, tick=lambda: None).proof
    assert (proof.base_deviation, proof.tuned_deviation) == (0, 0)
    assert proof.vllm.reasons
    folder = tmp_path / "whole" / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", HEADS[kind])
    outside = [name for name in load_file(folder / "adapter_model.safetensors") if ".lora_" not in name]
    assert {head for name in outside for head in HEADS[kind] if name.startswith(f"base_model.model.{head}.")} == set(
        HEADS[kind]
    )
    assert len(outside) == len(base_head(base))
    assert by_the_card(folder, base, rows) == [row["label"] for row in rows]


def base_head(base: str) -> list[str]:
    """Parameters of a classifier that the base's files are without."""
    return list(model.load_base(base, Quantization.NONE, labels=3).blank)


def proven(task: Task, done: Done, **changes: Any) -> Verify:
    return Verify(
        job="j", task=task, recipe=recipe_of(task, **changes), adapter_dir=done.path, report=done.report,
        memory_halvings=done.memory_halvings,
    )  # fmt: skip


def by_the_card(folder: Path, base: str, rows: Rows) -> list[str]:
    """The model card's own words, run; then every row, asked as a user would."""
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "always “felt”" in card
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace('"DIR"', repr(str(folder))).replace(f', revision="{"0" * 40}"', "")
    names: dict[str, Any] = {}
    exec(code.replace('"acme/tiny"', repr(base)), names)
    with torch.no_grad():
        return [
            names["config"].id2label[int(names["model"](**asked(names["tokenizer"], row)).logits.argmax())]
            for row in rows
        ]


def asked(tokenizer: Any, row: dict[str, Any]) -> dict[str, torch.Tensor]:
    inputs = tokenizer(row["text"], row["text_pair"], return_tensors="pt")
    return {name: tensor for name, tensor in inputs.items() if name in tokenizer.model_input_names}
