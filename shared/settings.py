"""Every setting of every process, in one class.

Owns: names, defaults and descriptions of settings. Nothing else reads settings from the environment. A setting is an
environment variable `MILLINER_<NAME>`. The same variables point at the local stack or at external servers, so a
production deployment differs by its environment only.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from shared.schemas.requests import TrackerKind


class Settings(BaseSettings):
    """The settings of one process. Times are in seconds, sizes in bytes."""

    model_config = SettingsConfigDict(env_prefix="MILLINER_", extra="ignore")

    database_url: SecretStr = Field(
        SecretStr("postgresql://milliner@127.0.0.1:5432/milliner"), description="Postgres, as a libpq URL."
    )
    redis_url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"),
        description="Redis or Valkey. It only wakes workers; its data may be deleted at any time.",
    )
    s3_endpoint: str | None = Field(None, description="S3 endpoint URL; unset means Amazon S3.")
    s3_public_endpoint: str | None = Field(
        None, description="S3 endpoint in presigned URLs, if clients reach it under another URL than `s3_endpoint`."
    )
    s3_region: str = Field("us-east-1", description="S3 region; it is part of every request signature.")
    s3_bucket: str = Field("milliner", description="Bucket for files, models, checkpoints and adapters.")
    s3_access_key: SecretStr = Field(SecretStr(""), description="S3 access key id.")
    s3_secret_key: SecretStr = Field(SecretStr(""), description="S3 secret access key.")
    presign_seconds: int = Field(3600, description="How long a presigned download URL is valid.")

    max_file_bytes: int = Field(8 * 1024**3, description="Largest dataset that may be uploaded.")
    max_row_bytes: int = Field(4 * 1024**2, description="Longest line that a dataset may have.")
    full_finetuning_bytes: int = Field(
        32 * 10**9,
        description="Memory limit of full fine-tuning, at 22 bytes per parameter; larger base models need LoRA.",
    )
    retry_window_seconds: float = Field(
        300.0,
        description="How long a retry (x-stainless-retry-count > 0) of an identical request counts as the same job.",
    )

    preview_seconds: float = Field(20.0, description="How long a preview request waits for a worker's answer.")

    lease_seconds: float = Field(60.0, description="How long a lease on a job lasts without a renewal.")
    heartbeat_seconds: float = Field(10.0, description="How often a worker renews its lease and reads `desired_state`.")
    fence_seconds: float = Field(
        45.0, description="A worker that has not renewed its lease for this long freezes its trainer."
    )
    sweep_seconds: float = Field(
        5.0,
        description="How often a sweeper looks for expired leases and for waiting jobs that no worker was notified of.",
    )
    rering_seconds: float = Field(
        30.0, description="Wait before workers are notified of a waiting job again; doubled each time."
    )
    max_crashes: int = Field(3, description="Crashes after which a job fails with reason `poison`.")
    crash_backoff_seconds: float = Field(
        5.0, description="Wait after a crash before the next attempt; doubled each time, up to 300."
    )
    stop_seconds: float = Field(
        15.0, description="How long a trainer may take to save a checkpoint when it is asked to stop."
    )
    stuck_seconds: float = Field(
        3600.0, description="An attempt that makes no progress for this long counts as crashed."
    )
    notice_command: str | None = Field(
        None,
        description="Command that is run repeatedly; exit code 0 means that the machine stops soon: the worker drains.",
    )
    notice_seconds: float = Field(
        5.0, description="Wait between runs of `notice_command`, and the time limit of each run."
    )
    purge_seconds: float = Field(
        3600.0, description="How often a worker deletes objects in the bucket that no database row refers to."
    )
    orphan_seconds: float = Field(86400.0, description="Age at which an object without a database row is deleted.")
    trainer_command: str | None = Field(
        None, description="Command that starts a trainer; unset means `python -m worker.trainer.main`."
    )
    warm_seconds: float = Field(
        300.0,
        description="How long an idle trainer stays alive with its base model in memory; 0 ends it with its job.",
    )
    signing_key_file: Path | None = Field(
        None,
        description="PEM file of the Ed25519 private key that signs published adapters; unset leaves them unsigned.",
    )

    integrations: Annotated[frozenset[TrackerKind], NoDecode] = Field(
        frozenset(),
        description="Trackers that jobs may use, such as `wandb,mlflow`; `train` workers need each tracker's settings.",
    )
    wandb_api_key: SecretStr | None = Field(None, description="Weights & Biases: the API key that logs all runs.")
    wandb_base_url: str = Field(
        "https://api.wandb.ai", description="Weights & Biases: the server's URL, if you host your own."
    )
    mlflow_tracking_uri: SecretStr | None = Field(
        None, description="MLflow: the server's URL; `http://user:password@host` if it needs a password."
    )
    mlflow_token: SecretStr | None = Field(None, description="MLflow: a bearer token, if the server needs one.")

    cache_dir: Path = Field(
        Path.home() / ".cache" / "milliner",
        description="Folder for cached base models and the work directories of attempts.",
    )
    cache_bytes: int = Field(
        200 * 1024**3, description="Disk limit of the base-model cache; the least recently used model is deleted first."
    )
    min_free_bytes: int = Field(
        1024**3, description="A worker claims no job when `cache_dir` has less free disk space than this."
    )
    device_memory_bytes: int = Field(
        0, description="Memory that a training run may use; 0 means all memory of its device."
    )
    torch_threads: int = Field(0, description="CPU threads of a trainer; 0 lets torch choose.")
    log_level: str = Field("INFO", description="Lowest log level that is written.")
    log_json: bool = Field(True, description="Write logs as JSON lines; false writes coloured text.")
    fault: str | None = Field(
        None, description="For tests: a failpoint and what happens there, such as `after_claim:kill`."
    )

    base_url: str | None = Field(None, description="Client: the URL of the API, such as http://127.0.0.1:8000/v1.")
    api_key: SecretStr | None = Field(None, description="Client: the API key.")
    data: Path = Field(Path.home() / ".milliner", description="Folder of the local stack (`milliner up --data`).")

    @field_validator("integrations", mode="before")
    @classmethod
    def _split_names(cls, value: object) -> object:
        """Split `wandb,mlflow`, as it stands in the environment, at the commas."""
        return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _times_in_order(self) -> Self:
        """Check that a trainer is frozen before its lease ends, and not after a single missed renewal."""
        if not 0 < self.heartbeat_seconds < self.fence_seconds < self.lease_seconds:
            found = f"{self.heartbeat_seconds:g}, {self.fence_seconds:g} and {self.lease_seconds:g}"
            raise ValueError(
                f"heartbeat, fence and lease seconds are {found}; allowed: above 0, each less than the next"
            )
        return self


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """Return the settings of this process, read from the environment once."""
    return Settings()
