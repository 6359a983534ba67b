"""What a job may start from, who may, and what must then not go away, on a real Postgres."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pytest
from sqlalchemy import Engine, text

from shared.broker.queues import Queue
from shared.database import adapters, attempts, jobs
from shared.database.checkpoints import drop_checkpoints, latest_checkpoints
from shared.database.session import session_scope
from shared.database.tables import Adapter, BaseModelRow, Checkpoint, File, Job, Tenant
from shared.database.tenants import ensure_tenant
from shared.errors import InvalidRequest, MillinerError, NotFound
from shared.ids import fine_tuned_name
from shared.schemas.requests import Desired, JobCreate, State
from shared.schemas.results import Metrics
from shared.storage import Entry
from tests.results import PLAN, REPORT
from tests.shared.job_rows import adapter, claim, queued, result_file

RECIPE = PLAN.recipe
PUBLISHED, SAVED = "a" * 64, "b" * 64


class Source(NamedTuple):
    """A job that has succeeded, with two checkpoints, and its names."""

    job: str
    model: str
    checkpoints: dict[int, str]  # step → id


@pytest.fixture(autouse=True)
def empty(database: Engine) -> None:
    with session_scope(database) as session:
        session.execute(text("TRUNCATE jobs, job_events, job_metrics, checkpoints, adapters CASCADE"))


@pytest.fixture
def source(database: Engine, tenant: Tenant, dataset: str) -> Source:
    job = queued(database, tenant, dataset)
    epoch = claim(database, Queue.TRAIN).lease_epoch
    model = fine_tuned_name("tiny", tenant.name, None, job.id)
    with session_scope(database) as session:
        for step in (4, 8):
            metrics, prefix = Metrics(step=step, total_steps=8), f"checkpoints/{step}/"
            files = [Entry(path="state.json", bytes=1, sha256="c" * 64), weights(SAVED)]
            attempts.add_checkpoint(session, job.id, epoch, step=step, prefix=prefix, files=files, metrics=metrics)
        found = {checkpoint.step: checkpoint.id for checkpoint in latest_checkpoints(session, job.id)}
        published = adapter(job)
        published.name, published.prefix, published.files = model, f"adapters/{job.id}/", [weights(PUBLISHED)]
        attempts.succeed(session, job.id, epoch, report=REPORT, adapter=published, result_file=result_file(job))
    return Source(job.id, model, found)


@pytest.fixture
def other_base(database: Engine) -> Iterator[str]:
    with session_scope(database) as session:
        session.add(
            BaseModelRow(
                name="other", public_id="org/other", revision="1", digest="o", prefix="models/o/", files=[], config={},
                parameters=1, bytes=1,
            )
        )  # fmt: skip
    yield "other"
    with session_scope(database) as session:
        session.execute(text("DELETE FROM base_models WHERE name = 'other'"))


def test_every_name_leads_to_its_adapter(database: Engine, tenant: Tenant, dataset: str, source: Source) -> None:
    step = f"{source.model}:ckpt-step-4"
    asked: list[tuple[dict[str, str], str, str, str]] = [
        ({"from_checkpoint": source.model}, source.model, f"adapters/{source.job}/", PUBLISHED),
        ({"from_checkpoint": source.checkpoints[4]}, step, "checkpoints/4/", SAVED),
        ({"from_checkpoint": step}, step, "checkpoints/4/", SAVED),
        ({"model": source.model}, source.model, f"adapters/{source.job}/", PUBLISHED),
        ({"model": source.checkpoints[4]}, step, "checkpoints/4/", SAVED),
        ({"model": step, "from_checkpoint": source.checkpoints[4]}, step, "checkpoints/4/", SAVED),
    ]
    for body, name, prefix, sha256 in asked:
        job = submit(database, tenant, dataset, **body)
        assert (job.base_model, job.start_name, job.start_prefix, job.start_sha256) == ("tiny", name, prefix, sha256)
        shape = {key: job.request["lora"][key] for key in adapters.SHAPE}
        assert shape == {key: getattr(RECIPE, key) for key in adapters.SHAPE}


def test_the_shape_is_the_sources_and_the_rest_is_free(
    database: Engine, tenant: Tenant, dataset: str, source: Source
) -> None:
    same = {"r": RECIPE.r, "alpha": "auto", "dropout": 0.3, "loraplus_lr_ratio": 4}
    job = submit(database, tenant, dataset, model=source.model, lora=same)
    lora = job.request["lora"]
    assert (lora["r"], lora["alpha"], lora["dropout"], lora["loraplus_lr_ratio"]) == (RECIPE.r, RECIPE.alpha, 0.3, 4)


@pytest.mark.parametrize(
    ("body", "error", "param", "code", "said"),
    [
        ({"from_checkpoint": "tiny"}, InvalidRequest, "from_checkpoint", "invalid_value", "'tiny' names no adapter"),
        ({"from_checkpoint": "ft:tiny:t::0"}, NotFound, "from_checkpoint", "model_not_found", "no model 'ft:tiny"),
        ({"model": "ft:tiny:t::0"}, NotFound, "model", "model_not_found", "list yours with"),
        ({"from_checkpoint": "ftckpt_0"}, NotFound, "from_checkpoint", "checkpoint_not_found", "no checkpoint"),
        ({"model": "ftckpt_0"}, NotFound, "model", "checkpoint_not_found", "list those of a job"),
        ({"model": "MODEL:ckpt-step-5"}, NotFound, "model", "checkpoint_not_found", "no checkpoint"),
        ({"model": "ft:else:OWN:ckpt-step-4"}, NotFound, "model", "checkpoint_not_found", "no checkpoint"),
        ({"model": "nope", "from_checkpoint": "MODEL"}, NotFound, "model", "model_not_found", "base model 'nope'"),
        ({"model": "other", "from_checkpoint": "MODEL"}, InvalidRequest, "from_checkpoint", "base_mismatch", "'tiny'"),
        (
            {"model": "MODEL", "from_checkpoint": "MODEL:ckpt-step-8"},
            InvalidRequest, "from_checkpoint", "invalid_value", "which is another adapter; name it once",
        ),
        (
            {"model": "MODEL", "method": {"type": "classification"}},
            InvalidRequest, "model", "unsupported_start", "this job of 'classification'",
        ),
        (
            {"model": "MODEL", "trainer": {"full_finetuning": True}},
            InvalidRequest, "trainer.full_finetuning", "unsupported_start", "start from the base",
        ),
        ({"model": "MODEL", "lora": {"r": 3}}, InvalidRequest, "lora.r", "lora_mismatch", "lora.r is 3, and 'ft:"),
        ({"model": "MODEL", "lora": {"alpha": 3}}, InvalidRequest, "lora.alpha", "lora_mismatch", "keeps its shape"),
        (
            {"model": "MODEL", "lora": {"target_modules": ["q_proj"]}},
            InvalidRequest, "lora.target_modules", "lora_mismatch", "has 'all-linear'",
        ),
        ({"model": "MODEL", "lora": {"use_dora": True}}, InvalidRequest, "lora.use_dora", "lora_mismatch", "leave it"),
        (
            {"lora": {"use_dora": True}, "quantization": "int8"},
            InvalidRequest, "quantization", "invalid_value", "int8 bears no DoRA",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_started_from_is_told(
    database: Engine,
    tenant: Tenant,
    dataset: str,
    source: Source,
    other_base: str,
    body: dict[str, Any],
    error: type[MillinerError],
    param: str,
    code: str,
    said: str,
) -> None:
    spelled = json.dumps(body).replace("MODEL", source.model).replace("OWN", source.model.split(":", 2)[2])
    with pytest.raises(error, match=said) as refused:
        submit(database, tenant, dataset, **json.loads(spelled))
    assert (refused.value.param, refused.value.code) == (param, code)


def test_what_was_trained_whole_is_not_gone_on_from(
    database: Engine, tenant: Tenant, dataset: str, source: Source
) -> None:
    with session_scope(database) as session:
        session.execute(text("UPDATE jobs SET plan = jsonb_set(plan, '{recipe,full_finetuning}', 'true')"))
        session.execute(text("UPDATE adapters SET files = jsonb_set(files, '{0,path}', '\"model.safetensors\"')"))
    for name in (source.model, source.checkpoints[4]):
        with pytest.raises(InvalidRequest, match="all weights are trained there is no adapter") as refused:
            submit(database, tenant, dataset, from_checkpoint=name)
        assert (refused.value.param, refused.value.code) == ("trainer.full_finetuning", "unsupported_start")


def test_another_tenants_is_not_found_as_one_that_never_was(database: Engine, dataset: str, source: Source) -> None:
    with session_scope(database) as session:
        stranger = ensure_tenant(session, f"stranger-{source.job[-8:]}")
        session.add(
            File(
                id=(own := f"file-{source.job[6:]}"), tenant_id=stranger.id, filename="a", purpose="fine-tune",
                status="processed", bytes=1, sha256="0" * 64, key="k",
            )
        )  # fmt: skip
    nobodys = ("ft:tiny:t::" + "0" * 30, "ftckpt_" + "0" * 30, "ft:tiny:t::" + "0" * 30 + ":ckpt-step-4")
    for mine, never in zip((source.model, source.checkpoints[4], f"{source.model}:ckpt-step-4"), nobodys, strict=True):
        for param in ("model", "from_checkpoint"):
            said = []
            for name in (mine, never):
                with pytest.raises(NotFound) as refused:
                    submit(database, stranger, own, **{param: name})
                said.append((refused.value.message.replace(name, "X"), refused.value.code, refused.value.param))
            assert said[0] == said[1]


def test_what_was_deleted_is_told_to_its_owner(database: Engine, tenant: Tenant, dataset: str, source: Source) -> None:
    with session_scope(database) as session:
        session.get_one(Adapter, source.job).deleted_at = datetime.now(UTC)
        session.get_one(Checkpoint, source.checkpoints[4]).deleted_at = datetime.now(UTC)
    with pytest.raises(NotFound, match="was deleted"):
        submit(database, tenant, dataset, model=source.model)
    with pytest.raises(NotFound, match="was dropped when newer ones came"):
        submit(database, tenant, dataset, from_checkpoint=source.checkpoints[4])
    assert submit(database, tenant, dataset, from_checkpoint=source.checkpoints[8]).start_prefix == "checkpoints/8/"


def test_another_start_is_another_request(database: Engine, tenant: Tenant, dataset: str, source: Source) -> None:
    def retried(**body: Any) -> str:
        with session_scope(database) as session:
            request = JobCreate.model_validate({"model": "tiny", "training_file": dataset} | body)
            return jobs.submit(session, tenant.id, request, retry_window=60)[0].id

    names = [None, source.model, source.checkpoints[4], source.checkpoints[8]]
    first, second = ([retried(from_checkpoint=name) for name in names] for _ in range(2))
    assert first == second
    assert len(set(first)) == 4


def test_a_folder_is_needed_until_the_job_has_ended(
    database: Engine, tenant: Tenant, dataset: str, source: Source
) -> None:
    job = submit(database, tenant, dataset, from_checkpoint=source.checkpoints[4])
    prefixes = ["checkpoints/4/", "checkpoints/8/"]
    with session_scope(database) as session:
        assert adapters.prefixes_in_use(session, prefixes) == {"checkpoints/4/"}
        assert (adapters.job_using(session, "checkpoints/4/"), adapters.job_using(session, "checkpoints/8/")) == (
            job.id,
            None,
        )
        jobs.set_desired_state(session, tenant.id, job.id, Desired.CANCEL)
    with session_scope(database) as session:
        assert session.get_one(Job, job.id).state == State.CANCELLED
        assert adapters.prefixes_in_use(session, prefixes) == set()


def test_a_checkpoint_that_is_dropped_while_a_job_is_submitted_keeps_its_objects(
    database: Engine, tenant: Tenant, dataset: str, source: Source
) -> None:
    """Its job still runs and saves newer ones; what it drops waits for the submit's lock, and then sees the job."""
    other = queued(database, tenant, dataset)
    epoch = claim(database, Queue.TRAIN).lease_epoch
    with session_scope(database) as session:
        for step in (1, 2):
            attempts.add_checkpoint(
                session, other.id, epoch, step=step, prefix=f"running/{step}/", files=[weights(SAVED)],
                metrics=Metrics(step=step, total_steps=8),
            )  # fmt: skip
        first = latest_checkpoints(session, other.id)[-1].id

    def drop() -> list[str]:
        with session_scope(database) as session:
            return drop_checkpoints(session, other.id, epoch, keep=0)

    with ThreadPoolExecutor() as pool:
        with session_scope(database) as session:
            request = JobCreate(model="tiny", training_file=dataset, from_checkpoint=first)
            jobs.submit(session, tenant.id, request)
            dropping = pool.submit(drop)
            with pytest.raises(TimeoutError):
                dropping.result(timeout=0.3)
        assert dropping.result() == ["running/2/"]
    with pytest.raises(NotFound, match="was dropped"):
        submit(database, tenant, dataset, from_checkpoint=first)


def submit(database: Engine, tenant: Tenant, dataset: str, **body: Any) -> Job:
    with session_scope(database) as session:
        request = JobCreate.model_validate({"model": "tiny", "training_file": dataset} | body)
        return jobs.submit(session, tenant.id, request)[0]


def weights(sha256: str) -> Entry:
    return Entry(path=adapters.WEIGHTS, bytes=1, sha256=sha256)
