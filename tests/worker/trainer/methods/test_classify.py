"""Classifiers on each kind of base overfit, resume bit for bit and pass the proof, and stock PEFT loads them."""

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
from shared.schemas.requests import Quantization
from tests.tiny import tiny_base, tiny_encoder
from tests.worker.trainer.conftest import MakeTask, Rows, WriteRows, adapter_bytes, recipe_of, run
from worker.trainer.artifact.verify import verify
from worker.trainer.data import dataset
from worker.trainer.data.classification import LabelledRow
from worker.trainer.data.encoding import Encoder
from worker.trainer.evaluation import evaluate
from worker.trainer.forward.batches import collate
from worker.trainer.forward.layout import Layout
from worker.trainer.methods import classify
from worker.trainer.model import classification_head
from worker.trainer.model.base import attach, detach, load_base, trainable
from worker.trainer.planning.prepare import prepare
from worker.trainer.protocol import CheckpointSaved, Done, Notice, Task, Verify

#: model_type → the head modules, which are trained in full.
ENCODERS = {"bert": ["bert.pooler", "classifier"], "roberta": ["classifier"], "deberta-v2": ["classifier", "pooler"]}
HEADS = ENCODERS | {"llama": ["score"], "gpt2": ["score"]}
#: model_type → settings that differ from those of a tiny BERT.
KINDS: dict[str, dict[str, Any]] = {
    "roberta": {"type_vocab_size": 1},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0},
}
STRIP = {"type": "Strip", "strip_left": True, "strip_right": True}
MakeBase = Callable[[str], str]


def hats(count: int) -> Rows:
    """Text pairs of different lengths. The second text determines the label."""
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
                tiny_encoder(folder, kind, **KINDS.get(kind, {}))
            else:
                tiny_base(folder, kind)
            made[kind] = str(folder)
        return made[kind]

    return make


def classification(task: MakeTask, rows: str, base: str, **fields: Any) -> Task:
    return task(rows, method="classification", base_dir=base, **fields)


# ---------------------------------------------------------------- complete runs


# peft 0.21 uses an attribute that transformers 5 has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", HEADS)
def test_a_classifier_is_trained_resumed_verified_and_loaded(
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
    assert found.majority.label == "felt"
    assert found.majority.accuracy == pytest.approx(1 / 3)
    assert [(sample.reference, sample.tuned.text) for sample in found.samples] == [
        (rows[sample.line - 1]["label"],) * 2 for sample in found.samples
    ]
    assert any("its score is chance" in caveat for caveat in found.change.caveats)
    assert any("is trained in full; rows are never packed" in notice.message for notice in observed.of(Notice))

    saved = run(task, tmp_path / "first", stop_at=9, **options).of(CheckpointSaved)[-1].path
    run(task, tmp_path / "second", resume_from=saved, **options)
    assert adapter_bytes(tmp_path / "second") == adapter_bytes(tmp_path / "whole")

    proof = verify(verify_command(task, done, **options), stopping=lambda: False, tick=lambda: None).proof
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
    """The parameters of the head that the base's files lack."""
    return list(load_base(base, Quantization.NONE, labels=list("012")).uninitialized)


def verify_command(task: Task, done: Done, **changes: Any) -> Verify:
    return Verify(
        job="j", task=task, recipe=recipe_of(task, **changes), adapter_dir=done.path, report=done.report,
        fallback_level=done.fallback_level,
    )  # fmt: skip


def by_the_card(folder: Path, base: str, rows: Rows) -> list[str]:
    """Run the code of the model card, then classify every row with it."""
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "always “felt”" in card
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace('"DIR"', repr(str(folder))).replace(f', revision="{"0" * 40}"', "")
    names: dict[str, Any] = {}
    exec(code.replace('"acme/tiny"', repr(base)), names)
    with torch.no_grad():
        return [
            names["config"].id2label[int(names["model"](**inputs(names["tokenizer"], row)).logits.argmax())]
            for row in rows
        ]


def inputs(tokenizer: Any, row: dict[str, Any]) -> dict[str, torch.Tensor]:
    return dict(tokenizer(row["text"], row["text_pair"], return_tensors="pt"))


# ---------------------------------------------------------------- input


@pytest.mark.parametrize("row", [hats(3)[2], {"text": "a hat, a hat, a hat", "label": "x"}], ids=["pair", "single"])
def test_a_row_is_encoded_as_by_the_tokenizer(
    bert: str, make_task: MakeTask, write_rows: WriteRows, row: dict[str, Any]
) -> None:
    """In full, and cut to any length that leaves room for text."""
    encoder = Encoder(bert)
    (whole,) = dataset.load(classification(make_task, write_rows([row]), bert), encoder).train
    texts = [row[key] for key in ("text", "text_pair") if key in row]
    for length in range(8, len(whole) + 2):
        cut, wanted = whole.cut(length), encoder.tokenizer(*texts, truncation=True, max_length=length)
        assert isinstance(cut, LabelledRow)
        assert cut.ids.tolist() == wanted["input_ids"]
        assert cut.types.tolist() == wanted["token_type_ids"]
        assert (cut.label, cut.learnable) == (row["label"], True)


def test_the_error_names_a_text_without_tokens(bert: str, make_task: MakeTask, write_rows: WriteRows) -> None:
    folder = shutil.copytree(bert, Path(write_rows([])).parent / "stripped")
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": STRIP}))
    rows = [{"text": "a hat", "label": 1}, {"text": "  ", "label": 2}]
    with pytest.raises(TrainingFailed, match="line 2: text: the base's tokenizer makes no token of it"):
        prepare(classification(make_task, write_rows(rows), str(folder)))


@pytest.mark.parametrize("kind", HEADS)
def test_rows_have_the_same_loss_alone_padded_and_by_transformers(
    kind: str, make_base: MakeBase, make_task: MakeTask, write_rows: WriteRows
) -> None:
    base_dir, rows = make_base(kind), hats(6)
    task = classification(make_task, write_rows(rows), base_dir)
    encoder, recipe = Encoder(base_dir), recipe_of(task)
    base = load_base(base_dir, Quantization.NONE, labels=list("012"), compute_dtype=torch.float32)
    classification_head.initialize(base.model, base.uninitialized, seed=1, pad=encoder.pad)
    adapted = attach(base, recipe).adapted
    encoded = dataset.load(task, encoder).train
    found = [
        evaluate.score(
            base, adapted, encoded, recipe, adapter=True, layout=Layout(False, False, micro_batch, encoder.pad)
        )
        for micro_batch in (1, 6)
    ]
    assert found[0].nats == pytest.approx(found[1].nats, rel=1e-4)
    assert (found[0].mean.tokens, found[0].weights.tolist()) == (6, [1] * 6)
    labels = recipe.labels or []
    adapted.eval()
    with torch.no_grad():
        for row, nats in zip(rows, found[0].nats, strict=True):
            label = torch.tensor([labels.index(row["label"])])
            theirs = adapted(**inputs(encoder.tokenizer, row), labels=label).loss
            assert float(theirs) == pytest.approx(float(nats), rel=1e-4)


@pytest.mark.parametrize(("kind", "context"), [("bert", 256), ("roberta", 255), ("deberta-v2", 256), ("gpt2", 256)])
def test_a_row_may_be_as_long_as_the_base_has_positions(
    kind: str, context: int, make_base: MakeBase, make_task: MakeTask, write_rows: WriteRows
) -> None:
    """RoBERTa's positions start after its padding index, so it has fewer than its config says."""
    rows = [{"text": "a hat " * 200, "label": label} for label in (0, 1)]
    task = classification(make_task, write_rows(rows), make_base(kind))
    encoder, recipe = Encoder(task.base_dir), recipe_of(task)
    assert recipe.max_length == context
    base = load_base(task.base_dir, Quantization.NONE, labels=list("01"))
    longest = dataset.load(task, encoder).train[0].cut(context).documents
    assert len(longest[0]) == context
    with torch.no_grad(), base.precision():
        assert classify.logits(base.model, collate([longest], packing=False, pad=encoder.pad)).isfinite().all()


# ---------------------------------------------------------------- the head


@pytest.mark.parametrize("kind", ["roberta", "deberta-v2"])
@pytest.mark.parametrize("quantization", list(Quantization))
def test_a_head_is_fp32_and_has_no_lora(
    kind: str, quantization: Quantization, make_base: MakeBase, make_task: MakeTask, write_rows: WriteRows
) -> None:
    task = classification(make_task, write_rows(hats(6)), make_base(kind), lora={"target_modules": ["dense"]})
    base = load_base(task.base_dir, quantization, labels=list("012"))
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    attached = attach(base, recipe_of(task))
    adapted = attached.adapted
    trained = trainable(adapted)
    heads = {name: parameter for name, parameter in trained.items() if ".modules_to_save." in name}
    assert len(heads) == len(base.uninitialized)
    assert all(type(parameter) is torch.nn.Parameter for parameter in heads.values())
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert all(".encoder.layer." in name for name in trained.keys() - heads.keys())
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(1)
    detach(attached)
    after = base.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_lora_on_the_head_alone_is_refused(bert: str, make_task: MakeTask, write_rows: WriteRows) -> None:
    task = classification(make_task, write_rows(hats(6)), bert, lora={"target_modules": ["classifier"]})
    base = load_base(bert, Quantization.NONE, labels=list("012"))
    with pytest.raises(TrainingFailed, match="only the head, which is trained in full") as failed:
        attach(base, recipe_of(task))
    assert (failed.value.code, failed.value.param) == ("invalid_lora", "lora.target_modules")


def test_initial_weights_depend_on_the_seed_only(bert: str) -> None:
    base = load_base(bert, Quantization.NONE, labels=list("0123"))
    drawn = []
    for seed in (1, 2, 1):
        classification_head.initialize(base.model, base.uninitialized, seed=seed, pad=0)
        drawn.append(base.model.classifier.weight.detach().clone())
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    assert base.model.classifier.bias.abs().sum() == 0


def test_a_head_in_the_files_is_kept_if_it_has_as_many_labels(bert: str, tmp_path: Path) -> None:
    AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3).save_pretrained(tmp_path)
    same, wider = (load_base(str(tmp_path), Quantization.NONE, labels=list(labels)) for labels in ("abc", "abcd"))
    assert same.uninitialized == ()
    assert wider.uninitialized == ("classifier.bias", "classifier.weight")
    assert same.head == wider.head == ("classifier",)


@pytest.mark.parametrize(("names", "kept"), [("abc", True), ("bac", False), ("xyz", False)])
def test_a_head_is_kept_only_if_its_labels_are_the_same(names: str, kept: bool, bert: str, tmp_path: Path) -> None:
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    AutoModelForSequenceClassification.from_pretrained(bert, **labels).save_pretrained(tmp_path)
    found = load_base(str(tmp_path), Quantization.NONE, labels=["a", "b", "c"])
    assert found.uninitialized == (() if kept else ("classifier.bias", "classifier.weight"))


def test_a_base_that_lacks_more_than_its_head_is_refused(bert: str, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "base")
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(TrainingFailed, match="lack 1 of its weights, such as bert") as failed:
        load_base(str(folder), Quantization.NONE, labels=list("012"))
    assert failed.value.code == "unsupported_base_model"


# ---------------------------------------------------------------- the published files


def other_labels(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"felt"', '"fur"'))


def no_head(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def other_head(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    changed = {name: tensor if ".lora_" in name else tensor.neg() for name, tensor in tensors.items()}
    save_file(changed, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def more_than_a_head(folder: Path) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"modules_to_save": [*config["modules_to_save"], "bert.embeddings"]}))


def no_classifier(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": "CAUSAL_LM"}))


FAULTS: dict[str, Callable[[Path], None]] = {
    "adapter_config_invalid": other_labels,
    "adapter_unreadable": no_head,
    "adapter_not_reproducible": other_head,
    "adapter_foreign_keys": more_than_a_head,
    "adapter_config_invalid ": no_classifier,
}


# peft 0.21 uses an attribute that transformers 5 has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_each_planted_fault_of_a_classifier_fails_with_its_own_code(
    bert: str, make_task: MakeTask, write_rows: WriteRows, tmp_path: Path
) -> None:
    task = classification(make_task, write_rows(hats(6)), bert, trainer={"max_steps": 6})
    [done] = run(task, tmp_path).of(Done)
    for code, plant in FAULTS.items():
        folder = shutil.copytree(done.path, tmp_path / plant.__name__)
        plant(folder)
        command = verify_command(task, done).model_copy(update={"adapter_dir": str(folder)})
        with pytest.raises(TrainingFailed) as failed:
            verify(command, stopping=lambda: False, tick=lambda: None)
        assert failed.value.code == code.strip(), failed.value.message
