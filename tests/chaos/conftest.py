"""Fixtures of the chaos tests: servers, fleets, `size` (CI or soak scale), and `figures` (writes measurements)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.chaos.fleet import Fleet
from tests.chaos.servers import Servers

T = TypeVar("T")


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """The three servers that fleets share. A test that kills servers uses `own_servers` instead."""
    with closing(Servers(tmp_path_factory.mktemp("servers"))) as running:
        running.start()
        yield running


@pytest.fixture(scope="module")
def own_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Servers of one test file, which its tests may kill."""
    with closing(Servers(tmp_path_factory.mktemp("servers"))) as running:
        running.start()
        yield running


@pytest.fixture
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Fleet]]:
    """`fleet(servers, **options)` starts a fleet, which ends with the test."""
    with ExitStack() as fleets:

        def start(servers: Servers, **options: Any) -> Fleet:
            started = fleets.enter_context(closing(Fleet(servers, tmp_path_factory.mktemp("fleet"), **options)))
            started.start()
            return started

        yield start


@pytest.fixture(scope="session")
def size(pytestconfig: pytest.Config) -> Callable[[T, T], T]:
    """`size(ci, soak)` returns its second argument with --soak, else its first."""
    soak = pytestconfig.getoption("--soak")
    return lambda ci, full: full if soak else ci


@pytest.fixture
def figures(pytestconfig: pytest.Config, request: pytest.FixtureRequest) -> Callable[[dict[str, Any]], None]:
    """`figures(measured)` prints what the test measured and writes it as JSON to the folder that --figures names."""
    folder = pytestconfig.getoption("--figures")

    def keep(measured: dict[str, Any]) -> None:
        print(json.dumps(measured))
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / f"{request.node.name}.json").write_text(json.dumps(measured, indent=1) + "\n")

    return keep
