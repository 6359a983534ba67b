"""A tiny base, as a folder and in the stack's catalog, so that whole jobs take seconds."""

from __future__ import annotations

import os
import subprocess
import sys

# Before transformers is imported: no test may look for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from deploy.local.folder import Record
from tests.tiny import tiny_llama

# A model this small is slower on two threads, and much slower where others work too.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny(stack: Record, llama: str) -> str:
    """The name of a tiny base in the stack's catalog."""
    command = [sys.executable, "-m", "deploy.local", "add-model", "tiny", llama, "--data", stack.data]
    subprocess.run([*command, "--public-id", "acme/tiny", "--revision", "1"], check=True, capture_output=True)
    return "tiny"
