"""Cancel, pause and resume concurrently with each other and with kill -9: every accepted request takes effect."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import openai

from tests.chaos.fleet import Fleet, kill
from tests.chaos.servers import Servers, until

ENDED = {"succeeded", "failed", "cancelled"}


def test_accepted_requests_take_effect_during_kills(
    fleet: Callable[..., Fleet], servers: Servers, size: Callable[..., Any], figures: Callable[[dict[str, Any]], None]
) -> None:
    """A job with an accepted cancel ends as `cancelled`; every other job is resumed and succeeds."""
    ours = fleet(servers, workers=2, slots=3)
    requests, chance = size(100, 1000), random.Random(11)
    client = ours.client.with_options(max_retries=5)
    cancelled: set[str] = set()
    asked = {"cancel": 0, "pause": 0, "resume": 0}
    refused = kills = 0
    while sum(asked.values()) < requests:
        if len(ours.unfinished()) < 8:
            ours.submit(6, step_ms=chance.choice([2, 20, 60]))
        job = chance.choice(ours.unfinished() or ours.accepted)
        action = chance.choices(["cancel", "pause", "resume"], weights=[1, 5, 5])[0]
        try:
            getattr(client.fine_tuning.jobs, action)(job)
        except openai.ConflictError:
            refused += 1
        else:
            asked[action] += 1
            if action == "cancel":
                cancelled.add(job)
        if chance.random() < 0.15:
            trainers = ours.processes().trainers
            if trainers:
                victim = chance.choice(trainers)
                kills += kill(chance.choice([victim.pid, victim.slot]))
    paused = set(ours.unfinished()) - cancelled
    while waiting := [job for job in paused if ours.states()[job] not in ENDED]:
        for job in waiting:
            try:
                client.fine_tuning.jobs.resume(job)
            except openai.ConflictError:
                continue
        until(lambda: bool(ENDED & {ours.states()[job] for job in waiting}), "a resumed job ends")
    states = ours.settle()
    found = ours.check()
    assert {job for job, state in states.items() if state == "cancelled"} == cancelled
    assert {states[job] for job in set(ours.accepted) - cancelled} == {"succeeded"}
    ours.check_adapters()
    figures({"asked": asked, "refused": refused, "kills": kills, **found._asdict() | {"steps_repeated": None}})
    assert found.overlaps == 0


def test_a_paused_job_frees_its_slot_and_keeps_its_steps(fleet: Callable[..., Fleet], servers: Servers) -> None:
    """With one slot, a second job runs while the first is paused. The first then continues at its next step."""
    ours = fleet(servers, workers=1, slots=1)
    [first] = ours.submit(max_steps=200, save_every=100, step_ms=20)
    until(lambda: len(ours.witness_of(first).splitlines()) > 5, "the first job trains")
    ours.client.fine_tuning.jobs.pause(first)
    until(lambda: ours.states()[first] == "paused", "the first job is paused")
    [second] = ours.submit(max_steps=3)
    until(lambda: ours.states()[second] == "succeeded", "the second job has had the slot")
    ours.client.fine_tuning.jobs.resume(first)
    ours.settle()
    steps = [int(line.split()[1]) for line in ours.witness_of(first).splitlines()]
    assert steps == list(range(1, 201))
    ours.check()
    ours.check_adapters()
