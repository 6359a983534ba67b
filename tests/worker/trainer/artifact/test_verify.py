"""The proof in a real child: a sound adapter passes, and each planted fault fails with its own code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from shared.errors import TrainingFailed
from shared.schemas.results import Proof
from tests.tiny import tiny_llama
from tests.worker.trainer.conftest import Child, quotes, recipe_of, run
from worker.trainer.artifact import read, verify
from worker.trainer.artifact.vllm import lora_support
from worker.trainer.data.encoding import Encoder
from worker.trainer.protocol import Done, Failed, Task, Verified, Verify

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    with Child() as child:
        yield child


@pytest.fixture(scope="module", params=["none", "nf4"])
def sound(request: pytest.FixtureRequest, llama: str, tmp_path_factory: pytest.TempPathFactory) -> Verify:
    """The command that the supervisor sends for a sound adapter."""
    work = tmp_path_factory.mktemp("work")
    rows = work / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in quotes(60)))
    task = Task.model_validate(
        {
            "base_dir": llama, "base_name": "acme/tiny", "base_revision": "0" * 40, "training_file": str(rows),
            "validation_file": None, "method": {}, "lora": {"r": 4}, "quantization": request.param,
            "trainer": {"max_steps": 6}, "seed": 7, "torch_threads": 1, "max_row_bytes": 1 << 20,
        }
    )  # fmt: skip
    done = run(task, work).of(Done)[0]
    return Verify(
        job="j", task=task, recipe=recipe_of(task), adapter_dir=done.path, report=done.report,
        fallback_level=done.fallback_level,
    )  # fmt: skip


SCORES = ("base", "tuned")


def test_a_sound_adapter_passes_and_reproduces_its_scores_exactly(child: Child, sound: Verify) -> None:
    child.send(sound)
    verified = child.until(Verified)
    proof = verified.proof
    assert (proof.base_deviation, proof.tuned_deviation) == (0, 0)
    assert proof.tuned == sound.report.tuned
    assert proof.max_logit_difference > 0
    assert proof.tensors == 28  # A and B of seven modules in two layers
    assert (proof.vllm.servable, proof.vllm.max_lora_rank) == (True, 8)
    assert verified.versions["torch"] == torch.__version__


# ---------------------------------------------------------------- faults


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        save_file(change(load_file(folder / TENSORS)), folder / TENSORS)

    return plant


def config(**changes: Any) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return plant


def cut(folder: Path) -> None:
    path = folder / TENSORS
    path.write_bytes(path.read_bytes()[:-100])


def foreign_template(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)


def foreign_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"add_prefix_space": false', '"add_prefix_space": true', 1))


def scaled(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: 3 * tensor for name, tensor in found.items()}


def zeroed(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor * 0 if ".lora_B" in name else tensor for name, tensor in found.items()}


def tiny(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor * 0 + 1e-30 if ".lora_B" in name else tensor for name, tensor in found.items()}


def with_nan(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = next(iter(found))
    return found | {name: found[name] * torch.nan}


def first(found: dict[str, torch.Tensor]) -> str:
    return next(iter(found))


FAULTS: dict[str, tuple[str, bool, Callable[[Path], object]]] = {
    "zeroed B": ("adapter_no_effect", False, tensors(zeroed)),
    "B lost in rounding": ("adapter_no_effect", False, tensors(tiny)),
    "a NaN": ("adapter_not_finite", False, tensors(with_nan)),
    "other weights": ("adapter_not_reproducible", True, tensors(scaled)),
    "an embedding": (
        "adapter_foreign_keys", False,
        tensors(lambda found: found | {"base_model.model.model.embed_tokens.weight": torch.zeros(2, 2)}),
    ),
    "a module that the base does not have": (
        "adapter_foreign_keys", False,
        tensors(lambda found: found | {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, 64)}),
    ),
    "a shape of another base": (
        "adapter_foreign_keys", False, tensors(lambda found: found | {first(found): torch.ones(4, 65)}),
    ),
    "a tensor short": (
        "adapter_unreadable", True, tensors(lambda found: {n: t for n, t in found.items() if n != first(found)}),
    ),
    "a truncated file": ("adapter_unreadable", True, cut),
    "no file": ("adapter_unreadable", True, lambda folder: (folder / TENSORS).unlink()),
    "half a config": ("adapter_unreadable", True, lambda folder: (folder / CONFIG).write_text("{")),
    "no tokenizer": ("adapter_unreadable", True, lambda folder: (folder / "tokenizer.json").unlink()),
    "a local path": ("adapter_config_invalid", False, config(base_model_name_or_path="/var/cache/models/ab12")),
    "a newer key": ("adapter_config_invalid", False, config(corda_config=None)),
    "no LoRA": ("adapter_config_invalid", False, config(peft_type="IA3")),
    "another base": ("base_mismatch", False, config(base_model_name_or_path="acme/huge")),
    "another revision": ("base_mismatch", False, config(revision="main")),
    "another alpha": ("adapter_not_reproducible", True, config(lora_alpha=1)),
    "a foreign template": ("template_mismatch", False, foreign_template),
    "a foreign tokenizer": ("template_mismatch", False, foreign_tokenizer),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("sound", ["none"], indirect=True)
def test_a_planted_fault_fails_with_its_own_code(child: Child, sound: Verify, tmp_path: Path, fault: str) -> None:
    code, retryable, plant = FAULTS[fault]
    folder = shutil.copytree(sound.adapter_dir, tmp_path / "adapter")
    plant(folder)
    assert_fails(child, sound.model_copy(update={"adapter_dir": str(folder)}), code, retryable)


@pytest.mark.parametrize("sound", ["none"], indirect=True)
def test_another_base_on_disk_is_detected(child: Child, sound: Verify, tmp_path: Path) -> None:
    """It has the same shapes and tokenizer, but other weights."""
    tiny_llama(tmp_path, seed=1)
    task = sound.task.model_copy(update={"base_dir": str(tmp_path)})
    assert_fails(child, sound.model_copy(update={"task": task}), "base_mismatch", True)


@pytest.mark.parametrize(("score", "code"), [("base", "base_mismatch"), ("tuned", "adapter_not_reproducible")])
@pytest.mark.parametrize("field", ["loss", "tokens"])
@pytest.mark.parametrize("sound", ["none"], indirect=True)
def test_a_report_with_other_scores_is_detected(child: Child, sound: Verify, score: str, code: str, field: str) -> None:
    right = getattr(sound.report, score)
    wrong = right.model_copy(update={field: getattr(right, field) * 2})
    assert_fails(child, sound.model_copy(update={"report": sound.report.model_copy(update={score: wrong})}), code, True)


def assert_fails(child: Child, command: Verify, code: str, retryable: bool) -> None:
    child.send(command)
    while not isinstance(event := child.next(), Failed):
        assert not isinstance(event, Verified), "the fault was not noticed"
    assert (event.code, event.retryable) == (code, retryable), event.message
    assert event.hint


# ---------------------------------------------------------------- without a child


def test_a_nan_loss_never_agrees_with_the_report(sound: Verify) -> None:
    nan = sound.report.tuned.model_copy(update={"loss": float("nan")})
    proof = Proof(
        base=sound.report.base, tuned=nan, base_deviation=0, tuned_deviation=0, tolerance=1, max_logit_difference=1,
        tensors=1, tokenizer_sha256="", vllm=lora_support({"r": 1}, "LlamaForCausalLM"),
    )  # fmt: skip
    with pytest.raises(TrainingFailed, match="does not score as reported: loss nan"):
        verify.check(proof, sound.report)
    verify.check(proof.model_copy(update={"tuned": sound.report.tuned}), sound.report)


@pytest.mark.parametrize(
    ("config", "architecture", "rank", "reason"),
    [
        ({"r": 16}, "LlamaForCausalLM", 16, None),
        ({"r": 17}, "LlamaForCausalLM", 32, None),
        ({"r": 600}, "LlamaForCausalLM", None, "rank, 600, is over 512"),
        ({"r": 8, "use_dora": True}, "LlamaForCausalLM", 8, "DoRA"),
        ({"r": 8, "modules_to_save": ["lm_head"]}, "LlamaForCausalLM", 8, "modules_to_save"),
        ({"r": 8, "bias": "all"}, "LlamaForCausalLM", 8, "biases"),
        ({"r": 8}, "GPT2LMHeadModel", 8, "no LoRA on GPT2LMHeadModel"),
    ],
)
def test_adapters_that_vllm_cannot_serve_are_reported_with_a_reason(
    config: dict[str, Any], architecture: str, rank: int | None, reason: str | None
) -> None:
    found = lora_support(config, architecture)
    assert (found.servable, found.max_lora_rank) == (reason is None, rank)
    assert len(found.reasons) == (reason is not None)
    assert reason is None or reason in found.reasons[0]


def test_dpo_compares_the_loss_of_the_chosen_answers_too(sound: Verify, child: Child) -> None:
    """DPO's own loss is log 2 on any base, and little less after a short training."""
    child.send(sound)
    proof = child.until(Verified).proof
    pairs = {"reward_accuracy": 0.5, "reward_margin": 0.0}
    report = sound.report.model_copy(
        update={name: getattr(sound.report, name).model_copy(update=pairs | {"chosen_loss": 4.0}) for name in SCORES}
    )
    for name, code in zip(SCORES, ("base_mismatch", "adapter_not_reproducible"), strict=True):
        found = {other: getattr(report, other) for other in SCORES}
        found[name] = found[name].model_copy(update={"chosen_loss": 4.1})
        with pytest.raises(TrainingFailed) as failed:
            verify.check(proof.model_copy(update=found), report)
        assert failed.value.code == code


def test_a_tokenizer_without_a_stop_token_has_a_fingerprint(llama: str, tmp_path: Path) -> None:
    """The stop token may be in the base's generation config only, and an adapter folder has none."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(llama, base)
    without_stop = AutoTokenizer.from_pretrained(base)
    without_stop.eos_token = None
    without_stop.save_pretrained(base)
    without_stop.save_pretrained(folder)
    encoder = Encoder(str(base))
    assert encoder.tokenizer.eos_token_id is None
    assert read.tokenizer_sha256(folder, encoder)
