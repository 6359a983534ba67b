"""compose.yaml: valid by the Compose Specification, no public ports, and a start order that works."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import compose_spec
import pytest
import yaml

from deploy.local import services
from shared.settings import Settings

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
TEXT = (DEPLOY / "compose.yaml").read_text()
OURS = ("migrate", "api", "prepare", "train")


def interpolated() -> dict[str, Any]:
    """Return the file as compose reads it, with "secret" for each required variable."""
    text = re.sub(r"\$\{\w+:\?[^}]*\}", "secret", TEXT)
    loaded: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text).replace("$$", "$"))
    return loaded


def test_it_satisfies_the_compose_specification() -> None:
    compose_spec.PyCompose.from_json(json.dumps(interpolated())).validate()


def test_the_validator_notices_a_wrong_key() -> None:
    broken = interpolated()
    broken["services"]["api"]["portz"] = []
    with pytest.raises(ValueError, match="portz"):
        compose_spec.PyCompose.from_json(json.dumps(broken))


def test_every_secret_is_required() -> None:
    names = re.findall(r"\$\{(\w*(?:PASSWORD|KEY)\w*)(:?.)", TEXT)
    assert {name for name, _ in names} == {"POSTGRES_PASSWORD", "VALKEY_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY"}
    assert {operator for _, operator in names} == {":?"}


def test_ports_are_published_on_loopback_only() -> None:
    published = [port for service in interpolated()["services"].values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_images_are_pinned() -> None:
    images = [service["image"] for service in interpolated()["services"].values() if "build" not in service]
    assert len(images) == 3
    assert all(re.fullmatch(r"[\w/]+:\d+(\.\d+)+", image) for image in images), images


def test_services_wait_until_their_servers_are_healthy() -> None:
    services = interpolated()["services"]
    for name in ("postgres", "valkey", "s3", "api"):
        assert "healthcheck" in services[name]
    for name in OURS:
        for needed, dependency in services[name]["depends_on"].items():
            expected = "service_completed_successfully" if needed == "migrate" else "service_healthy"
            assert dependency["condition"] == expected, (name, needed)


def test_our_services_use_only_known_settings() -> None:
    known = {f"MILLINER_{name.upper()}" for name in Settings.model_fields}
    for name in OURS:
        assert set(interpolated()["services"][name]["environment"]) <= known


@pytest.mark.parametrize("queue", ["prepare", "train"])
def test_workers_have_the_command_of_the_local_stack(queue: str) -> None:
    program = services.worker(queue, {}, slots=1)
    assert interpolated()["services"][queue]["command"] == program.argv[2:]
    assert interpolated()["services"][queue]["stop_grace_period"] == f"{program.grace:.0f}s"


def test_only_train_has_the_signing_key() -> None:
    with_secrets = {name: s["environment"] for name, s in interpolated()["services"].items() if "secrets" in s}
    assert list(with_secrets) == ["train"]
    assert with_secrets["train"]["MILLINER_SIGNING_KEY_FILE"] == "/run/secrets/signing_key"


def test_only_train_reserves_gpus() -> None:
    reserving = [name for name, service in interpolated()["services"].items() if "deploy" in service]
    assert reserving == ["train"]
