"""The `milliner` command as a user runs it, against the real stack."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from client.cli import app, main
from deploy.local.folder import Record
from shared.settings import get_settings

ROOT = Path(__file__).resolve().parents[2]
MODEL = "SmolLM2-135M-Instruct"
TWO_STEPS = ("--set", "trainer.max_steps=2")
TRAIN = ("--model", MODEL, *TWO_STEPS, "--batch-size", "4", "--r", "4", "--set", "trainer.max_length=64")


class Done(NamedTuple):
    """How one command ended."""

    returncode: int
    stdout: str
    stderr: str

    def json(self) -> Any:
        return json.loads(self.stdout)


def milliner(stack: Record, *arguments: str | Path, **env: str) -> Done:
    """Run a command in this process, for speed, with pipes for output and no settings but the given ones."""
    out, err = io.BytesIO(), io.BytesIO()
    code: object = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(io.TextIOWrapper(out, encoding="utf-8", write_through=True)),
        redirect_stderr(io.TextIOWrapper(err, encoding="utf-8", write_through=True)),
    ):
        for name in [name for name in os.environ if name.startswith("MILLINER_")]:
            patch.delenv(name)
        for name, value in (settings(stack) | env).items():
            patch.setenv(name, value)
        get_settings.cache_clear()
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = exit.code
        finally:
            get_settings.cache_clear()
        said = out.getvalue().decode(), err.getvalue().decode()
    assert isinstance(code, int)
    return Done(code, *said)


def settings(stack: Record) -> dict[str, str]:
    return {"MILLINER_DATA": stack.data, "COLUMNS": "200"}


def dataset(path: Path, rows: Sequence[str]) -> Path:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = [json.dumps({"prompt": f"{number} + 1 =", "completion": f" {number + 1}"}) for number in range(12)]
    return dataset(tmp_path_factory.mktemp("data") / "sums.jsonl", lines)


@pytest.fixture(scope="module")
def finished(stack: Record, rows: Path) -> Done:
    """One small job, submitted and followed to its end."""
    ran = milliner(stack, "submit", rows, *TRAIN, "--follow", "--yes", "--set", "metadata.made=here", "--json")
    assert ran.returncode == 0, ran.stderr
    return ran


def test_a_job_goes_all_the_way(finished: Done) -> None:
    job = finished.json()
    assert job["status"] == "succeeded"
    assert job["plan"]["recipe"]["r"] == 4
    assert job["report"]["tuned"]["loss"] != job["report"]["base"]["loss"]
    lines = finished.stderr.splitlines()
    assert any(line.startswith("running, training  step ") for line in lines)
    assert lines[-1] == "succeeded"


def test_show_ls_and_logs_have_the_job(stack: Record, finished: Done) -> None:
    job = finished.json()
    shown = milliner(stack, "show", job["id"]).stdout
    assert "succeeded" in shown
    assert f"{job['report']['tuned']['loss']:.4f}" in shown
    assert job["id"] in milliner(stack, "ls", "--metadata", "made=here").stdout
    assert job["id"] not in milliner(stack, "ls", "--metadata", "made=there").stdout
    printed = milliner(stack, "logs", job["id"]).stdout
    events = [json.loads(line) for line in milliner(stack, "logs", job["id"], "--follow", "--json").stdout.splitlines()]
    assert "Created" in events[0]["message"]
    assert "successfully completed" in events[-1]["message"]
    assert [event["message"] for event in events if event["message"] not in printed] == []
    assert [event["id"] for event in events] == sorted(event["id"] for event in events)


def test_the_report_is_a_table_and_the_same_in_json(stack: Record, finished: Done, rows: Path) -> None:
    job = finished.json()
    told = milliner(stack, "report", job["id"])
    assert told.returncode == 0, told.stderr
    for said in (f"{job['report']['tuned']['loss']:.4f}", f"{job['report']['change']['verdict']}: the loss "):
        assert said in told.stdout
    assert "! measured on the training rows themselves" in told.stdout
    samples = job["report"]["samples"]
    assert [told.stdout.count(f"line {sample['line']} ") for sample in samples] == [1] * 4
    assert milliner(stack, "report", job["id"], "--json").json() == job["report"]
    planned = milliner(stack, "submit", rows, *TRAIN, "--dry-run", "--json").json()
    refused = milliner(stack, "report", planned["id"])
    assert (refused.returncode, refused.stdout) == (1, "")
    assert f"{planned['id']} has no report: it is cancelled" in refused.stderr


def test_pull_brings_a_checked_adapter(stack: Record, finished: Done, tmp_path: Path) -> None:
    job = finished.json()
    pulled = milliner(stack, "pull", job["id"], tmp_path / "hat")
    assert f"every hash checked, signed by {job['adapter']['signed_by']}" in pulled.stdout, pulled.stderr
    assert {path.name for path in (tmp_path / "hat").iterdir()} >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "manifest.json",
    }
    again = milliner(stack, "pull", job["id"], tmp_path / "hat", "--json").json()
    assert again["uri"] == job["adapter"]["uri"]
    verified = milliner(stack, "verify", tmp_path / "hat", "--key", Path(stack.data, "signing.pub"), "--json").json()
    assert (verified["ok"], verified["signature"], verified["job"]) == (True, "trusted", job["id"])
    assert "downloaded and reloaded" in milliner(stack, "show", job["id"]).stdout
    (tmp_path / "hat" / "manifest.json.sig").write_bytes(bytes(64))
    (tmp_path / "hat" / "README.md").write_text("A better adapter.")
    spoiled = milliner(stack, "verify", tmp_path / "hat")
    assert spoiled.returncode == 1
    assert "README.md: its bytes differ from those that were published" in spoiled.stdout


def test_a_job_starts_from_another(stack: Record, rows: Path, finished: Done) -> None:
    """By `from_checkpoint` alone, by `--model`, and by a checkpoint beside its base; a wrong one is an error."""
    name, short = finished.json()["fine_tuned_model"], (*TWO_STEPS, "--dry-run", "--json")
    checkpoint = f"{name}:ckpt-step-2"
    for said, start in (
        (("--set", f"from_checkpoint={name}"), name),
        (("--model", name), name),
        (("--model", MODEL, "--set", f"from_checkpoint={checkpoint}"), checkpoint),
    ):
        planned = milliner(stack, "submit", rows, *said, *short)
        assert planned.returncode == 0, planned.stderr
        job = planned.json()
        assert (job["model"], job["from_checkpoint"], job["plan"]["recipe"]["r"]) == (MODEL, start, 4)
    assert f"starts from  {checkpoint}" in milliner(stack, "show", job["id"]).stdout
    refused = milliner(stack, "submit", rows, "--set", f"from_checkpoint={name}:ckpt-step-3", *short)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "no checkpoint" in refused.stderr
    assert "no model is given; name one with --model" in milliner(stack, "submit", rows, *short).stderr


def test_the_result_file_can_be_read(stack: Record, finished: Done) -> None:
    text = milliner(stack, "files", "cat", finished.json()["result_files"][0]).stdout
    assert text.startswith("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n1,")


@pytest.mark.parametrize("command", [("models",), ("models", "ls"), ("files",), ("ls",), ("logs", "JOB")], ids=" ".join)
def test_lists_are_the_apis_own_objects(stack: Record, finished: Done, command: tuple[str, ...]) -> None:
    words = [finished.json()["id"] if word == "JOB" else word for word in command]
    listed = milliner(stack, *words, "--json").json()
    assert listed["object"] == "list"
    assert listed["data"]


def test_a_preview_shows_rows_and_leaves_no_file(stack: Record, rows: Path) -> None:
    files = milliner(stack, "files", "--json").json()["data"]
    shown = milliner(stack, "preview", rows, "--model", MODEL, "--rows", "2")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[:3] == ["line 1: 8 tokens, 3 trained", "0 + 1 =⟦ 1<|im_end|>⟧", ""]
    assert milliner(stack, "files", "--json").json()["data"] == files


def test_a_preview_cuts_rows_where_training_will(stack: Record, rows: Path) -> None:
    shown = milliner(stack, "preview", rows, "--model", MODEL, "--rows", "1", "--set", "trainer.max_length=8", "--json")
    assert shown.json()["max_length"] == 8


def test_a_preview_of_bad_rows_shows_them_too(stack: Record, tmp_path: Path) -> None:
    bad = dataset(tmp_path / "bad.jsonl", ['{"text": "felt"}', '{"text": 7}'])
    shown = milliner(stack, "preview", bad, "--model", MODEL, "--line", "2", "--line", "1", "--json")
    assert shown.returncode == 1
    assert [row["line"] for row in shown.json()["rows"]] == [1]
    assert [problem["line"] for problem in shown.json()["problems"]] == [2]


def test_bad_rows_are_left_out_on_request(stack: Record, tmp_path: Path) -> None:
    bad = dataset(tmp_path / "bad.jsonl", ['{"text": "felt"}'] * 9 + ['{"text": 7}'])
    refused = milliner(stack, "submit", bad, *TRAIN, "--dry-run")
    assert refused.returncode == 1
    assert "1 of 10 rows cannot be trained on" in refused.stdout
    ran = milliner(stack, "submit", bad, *TRAIN, "--dry-run", "--set", "trainer.skip_bad_rows=1")
    assert ran.returncode == 0, ran.stderr
    assert "1 skipped as bad, 8 repeat an earlier row" in ran.stdout


def test_a_dry_run_shows_the_plan_and_leaves_no_file(stack: Record, finished: Done, rows: Path) -> None:
    files = milliner(stack, "files", "--json").json()["data"]
    ran = milliner(stack, "submit", rows, *TRAIN, "--dry-run")
    assert ran.returncode == 0
    assert "2: " in ran.stdout
    assert "4 rows per step" in ran.stdout
    planned = milliner(stack, "submit", rows, *TRAIN, "--dry-run", "--json").json()
    assert (planned["status"], planned["reason"]) == ("cancelled", "dry_run")
    assert planned["plan"]["recipe"]["total_steps"] == 2
    assert milliner(stack, "files", "--json").json()["data"] == files


def test_an_estimate_leaves_no_file(stack: Record, rows: Path) -> None:
    files = milliner(stack, "files", "--json").json()["data"]
    asked = milliner(stack, "estimate", rows, "--model", MODEL, "--r", "8", "--device-memory", "24GB")
    assert asked.returncode == 0, asked.stderr
    assert "fits into 24.0 GB" in asked.stdout
    whole = milliner(stack, "estimate", rows, "--model", MODEL, "--set", "quantization=int8", "--json").json()
    assert (whole["tokens_source"], whole["quantization"]) == ("file_size", "int8")
    assert milliner(stack, "estimate", MODEL, rows, "--set", "quantization=int8", "--json").json() == whole
    tight = milliner(stack, "estimate", "--model", MODEL, "--device-memory", "500MB")
    assert tight.returncode == 1
    assert "does not fit into 500.0 MB" in tight.stdout
    assert milliner(stack, "files", "--json").json()["data"] == files


def test_bad_rows_are_reported_and_the_file_is_not_kept(stack: Record, tmp_path: Path) -> None:
    good = json.dumps({"prompt": "a", "completion": "b"})
    broken = dataset(tmp_path / "torn.jsonl", [*[good] * 6, '{"prompt": ', good])
    ran = milliner(stack, "submit", broken, *TRAIN)
    assert ran.returncode == 1
    assert "torn.jsonl: 1 of 8 rows cannot be trained on" in ran.stdout
    assert "\n7 " in ran.stdout
    assert "torn.jsonl" not in milliner(stack, "files").stdout


def test_a_file_can_be_added_listed_and_removed(stack: Record, rows: Path) -> None:
    added = milliner(stack, "files", "add", rows, "--json").json()
    assert added["report"]["rows"] == 12
    assert added["id"] in milliner(stack, "files", "ls").stdout
    assert milliner(stack, "files", "rm", added["id"], "--json").json()["deleted"] is True
    assert milliner(stack, "files", "cat", added["id"]).returncode == 1


def test_an_uploaded_file_is_trained_on_and_kept(stack: Record, rows: Path) -> None:
    added = milliner(stack, "files", "add", rows, "--json").json()
    named = ("--set", f"training_file={added['id']}", "--set", f"validation_file={added['id']}")
    planned = milliner(stack, "submit", *TRAIN, *named, "--set", "dry_run=true", "--json").json()
    assert (planned["reason"], planned["training_file"], planned["validation_file"]) == ("dry_run", *[added["id"]] * 2)
    assert milliner(stack, "files", "rm", added["id"], "--json").json()["deleted"] is True


def test_ctrl_c_detaches_and_the_job_continues(stack: Record, finished: Done, rows: Path) -> None:
    sent = milliner(stack, "submit", rows, *TRAIN[:2], "--epochs", "50", "--json").json()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MILLINER_")}
    with subprocess.Popen(
        [sys.executable, "-u", "-c", "from client.cli import main; main()", "show", sent["id"], "--follow"],
        cwd=ROOT,
        env=clean | settings(stack),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as watching:
        assert watching.stdout is not None
        watching.stdout.readline()
        watching.send_signal(signal.SIGINT)
        _, said = watching.communicate(timeout=30)
    assert watching.returncode == 130
    assert f"milliner show {sent['id']} --follow" in said
    assert milliner(stack, "show", sent["id"], "--json").json()["status"] in ("validating_files", "queued", "running")
    assert f"{sent['id']} is " in milliner(stack, "cancel", sent["id"]).stdout
    ended = milliner(stack, "show", sent["id"], "--follow")
    assert ended.returncode == 1
    assert ended.stdout.splitlines()[-1].strip() == "cancelled"
    nothing = milliner(stack, "pull", sent["id"], "nowhere")
    assert nothing.returncode == 1
    assert "has no adapter: it is cancelled" in nothing.stderr


def test_errors_are_one_line_on_stderr(stack: Record, rows: Path, tmp_path: Path) -> None:
    server = {"MILLINER_BASE_URL": stack.base_url, "MILLINER_API_KEY": "mln_wrong"}
    cases = (
        (milliner(stack, "show", "ftjob-none"), "not_found, "),
        (milliner(stack, "ls", **server), "invalid_api_key, "),
        (milliner(stack, "ls", **server | {"MILLINER_BASE_URL": "http://127.0.0.1:9/v1"}), "milliner up"),
        (milliner(stack, "ls", "--data", tmp_path), f"milliner up --data {tmp_path}"),
        (milliner(stack, "submit", rows, "--model", "none-such"), "model_not_found, "),
        (milliner(stack, "submit", rows, "--model", MODEL, "--r", "0"), "lora.r"),
        (milliner(stack, "submit", rows, "--model", MODEL, "--set", "lora.rank=8"), "did you mean lora.r?"),
        (milliner(stack, "submit", rows, "--model", MODEL, "--set", "lora.r=x"), 'found "x" for lora.r; allowed: auto'),
        (milliner(stack, "submit", rows, *TRAIN, "--set", "lora.r=8"), "--r 4 contradicts --set lora.r=8"),
        (milliner(stack, "submit", rows, *TRAIN, "--set", "training_file=file-1"), "contradicts --set training_file"),
        (milliner(stack, "submit", *TRAIN), "no dataset is given; name a FILE"),
        (milliner(stack, "estimate", rows), f"no model is given for {rows}; name one with --model"),
        (milliner(stack, "estimate", "a", "b", "--model", MODEL), "found 2 arguments: a b; allowed: --model MODEL and"),
        (milliner(stack, "estimate", "--set", "seed=1", "--model", MODEL), "unknown key 'seed'"),
        (milliner(stack, "preview", rows, "--model", MODEL, "--set", "lora.r=8"), "unknown key 'lora.r'"),
        (milliner(stack, "models", "rm", MODEL), "permission_denied, "),
    )
    for ran, said in cases:
        assert ran.returncode == 1
        assert said in ran.stderr
        assert len(ran.stderr.splitlines()) == 1
        assert ran.stdout == ""


def test_a_folder_that_cannot_be_written_to_is_one_line(stack: Record, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file, where a folder should be made")
    ran = milliner(stack, "models", "pull", MODEL, tmp_path / "taken" / "here")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == f"milliner: {tmp_path / 'taken' / 'here'}: Not a directory\n"


def every_command(group: Any, *names: str) -> list[tuple[tuple[str, ...], Any]]:
    nested = getattr(group, "commands", {})
    found = [(names, group)] if names else []
    return found + [entry for name, command in nested.items() for entry in every_command(command, *names, name)]


COMMANDS = every_command(typer.main.get_command(app))


@pytest.mark.parametrize(("names", "command"), COMMANDS, ids=[" ".join(names) for names, _ in COMMANDS])
def test_help_explains_every_option(names: tuple[str, ...], command: Any) -> None:
    assert command.help
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    assert [option.name for option in options if not option.help] == []
    if not hasattr(command, "commands") and names != ("verify",):  # which needs no server
        assert "--data" in {word for option in options for word in option.opts}
