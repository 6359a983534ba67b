"""The proof of a full model in a real child: a sound model passes, and each planted fault fails with its own code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.worker.trainer.conftest import Child, quotes, recipe_of, run
from worker.trainer.artifact.vllm import model_support
from worker.trainer.protocol import Done, Failed, Task, Verified, Verify

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FIRST = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    with Child() as child:
        yield child


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def sound(request: pytest.FixtureRequest, llama: str, tmp_path_factory: pytest.TempPathFactory) -> Verify:
    """The command that the supervisor sends for a sound model, for each type of the base's files."""
    work, base = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("base")
    AutoModelForCausalLM.from_pretrained(llama, dtype=request.param).save_pretrained(base)
    AutoTokenizer.from_pretrained(llama).save_pretrained(base)
    rows = work / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in quotes(60)))
    task = Task.model_validate(
        {
            "base_dir": str(base), "base_name": "acme/tiny", "base_revision": "0" * 40, "training_file": str(rows),
            "validation_file": None, "method": {}, "lora": {}, "quantization": "none",
            "trainer": {"max_steps": 6, "full_finetuning": True}, "seed": 7, "torch_threads": 1,
            "max_row_bytes": 1 << 20,
        }
    )  # fmt: skip
    done = run(task, work, learning_rate=1e-3).of(Done)[0]
    recipe = recipe_of(task, learning_rate=1e-3)
    return Verify(job="j", task=task, recipe=recipe, adapter_dir=done.path, report=done.report)


def test_a_sound_model_passes_and_reproduces_its_scores_exactly(child: Child, sound: Verify) -> None:
    child.send(sound)
    proof = child.until(Verified).proof
    assert (proof.base_deviation, proof.tuned_deviation) == (0, 0)
    assert proof.tuned == sound.report.tuned
    assert proof.max_logit_difference > 0
    published, stored = (load_file(Path(folder, WEIGHTS)) for folder in (sound.adapter_dir, sound.task.base_dir))
    assert {name: t.dtype for name, t in published.items()} == {name: t.dtype for name, t in stored.items()}
    assert proof.tensors == len(published)
    assert (proof.vllm.servable, proof.vllm.max_lora_rank) == (True, None)


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path, Path], None]:
    def plant(folder: Path, base: Path) -> None:
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})

    return plant


def cut(folder: Path, base: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def config(**changes: object) -> Callable[[Path, Path], None]:
    def plant(folder: Path, base: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return plant


FAULTS: dict[str, tuple[str, bool, Callable[[Path, Path], object]]] = {
    "weights of the base": (
        "adapter_no_effect", False, lambda folder, base: shutil.copy(base / WEIGHTS, folder / WEIGHTS),
    ),
    "a NaN": ("adapter_not_finite", False, tensors(lambda found: found | {FIRST: found[FIRST] * torch.nan})),
    "other weights": (
        "adapter_not_reproducible", True, tensors(lambda found: found | {FIRST: found[FIRST].roll(1, 0) * 3}),
    ),
    "a foreign key": ("adapter_foreign_keys", False, tensors(lambda found: found | {"extra.weight": torch.ones(2)})),
    "a shape of another base": (
        "adapter_foreign_keys", False, tensors(lambda found: found | {FIRST: found[FIRST][:-1].contiguous()}),
    ),
    "a tensor short": (
        "adapter_unreadable", True, tensors(lambda found: {n: t for n, t in found.items() if n != FIRST}),
    ),
    "a truncated file": ("adapter_unreadable", True, cut),
    "no file": ("adapter_unreadable", True, lambda folder, base: (folder / WEIGHTS).unlink()),
    "half a config": ("adapter_unreadable", True, lambda folder, base: (folder / CONFIG).write_text("{")),
    "another config": ("adapter_config_invalid", False, config(rms_norm_eps=1e-3)),
    "a local path": ("adapter_config_invalid", False, config(_name_or_path="/var/cache/models/ab12")),
    "no tokenizer": ("adapter_unreadable", True, lambda folder, base: (folder / "tokenizer.json").unlink()),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("sound", [torch.bfloat16], indirect=True)
def test_a_planted_fault_fails_with_its_own_code(child: Child, sound: Verify, tmp_path: Path, fault: str) -> None:
    code, retryable, plant = FAULTS[fault]
    folder = shutil.copytree(sound.adapter_dir, tmp_path / "model")
    plant(folder, Path(sound.task.base_dir))
    child.send(sound.model_copy(update={"adapter_dir": str(folder)}))
    while not isinstance(event := child.next(), Failed):
        assert not isinstance(event, Verified), "the fault was not noticed"
    assert (event.code, event.retryable) == (code, retryable), event.message
    assert event.hint


def test_an_architecture_unknown_to_vllm_is_reported() -> None:
    assert model_support("LlamaForCausalLM").servable
    assert "implement OddForCausalLM" in model_support("OddForCausalLM").reasons[0]
