"""Completion of `--set` as the shells ask for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from client.cli import main

ROOT = Path(__file__).resolve().parents[2]


def answered(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, **asked: str) -> list[str]:
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("milliner submit f.jsonl --set lora.use", ["lora.use_rslora=", "lora.use_dora="]),
        ("milliner submit f.jsonl --set seed=1 --set quantization=i", ["quantization=int8"]),
        ("milliner estimate --set device_f", ["device_flops=null", "device_flops=1e+06"]),
        ("milliner preview f.jsonl --set ro", ["rows=", "rows=8"]),
    ],
)
def test_fish_gets_the_keys_of_the_command_with_what_they_allow(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str, expected: list[str]
) -> None:
    asked = {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    lines = answered(capsys, monkeypatch, _MILLINER_COMPLETE="complete_fish", **asked)
    assert [line.split("\t")[0] for line in lines] == expected
    assert all(line.split("\t")[1] for line in lines)


def test_zsh_gets_them_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    line = "milliner submit f.jsonl --set trainer.max_"
    text = "\n".join(answered(capsys, monkeypatch, _MILLINER_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS=line))
    assert '"trainer.max_length=":"auto or an integer from 8 to 131072; default auto"' in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("milliner", "submit", "f.jsonl", "--set", "trainer.max_"), "trainer.max_length= trainer.max_steps="),
        (("milliner", "submit", "f.jsonl", "--set", "quant"), "quantization=nf4 quantization=int8 quantization=none"),
    ],
)
def test_bash_runs_the_script_that_is_installed(tmp_path: Path, words: tuple[str, ...], expected: str) -> None:
    command = tmp_path / "milliner"
    command.write_text(f'#!/bin/sh\ncd {ROOT}\nexec {sys.executable} -c "from client.cli import main; main()" "$@"\n')
    command.chmod(0o755)
    script = f"""
    eval "$(_MILLINER_COMPLETE=source_bash {command})"
    COMP_WORDS=({" ".join(words)}) COMP_CWORD={len(words) - 1}
    _milliner_completion {command}
    echo "${{COMPREPLY[*]}}"
    """
    done = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == expected, done.stderr
