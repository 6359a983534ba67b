"""Every setting of every process, in one class. Nothing else reads settings from the environment.

A setting is an environment variable `MILLINER_<NAME>`; the same names point at the local stack or at outside servers,
so production differs by environment only.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from shared.schemas.requests import TrackerKind


class Settings(BaseSettings):
    """Times are seconds, sizes are bytes."""

    model_config = SettingsConfigDict(env_prefix="MILLINER_", extra="ignore")

    database_url: SecretStr = Field(
        SecretStr("postgresql://milliner@127.0.0.1:5432/milliner"), description="Postgres, as a libpq URL."
    )
    redis_url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"), description="Redis or Valkey; a doorbell only, it may be flushed."
    )
    s3_endpoint: str | None = Field(None, description="S3 endpoint URL; unset means Amazon's.")
    s3_public_endpoint: str | None = Field(
        None, description="Endpoint that clients reach, for presigned URLs, where it differs from `s3_endpoint`."
    )
    s3_region: str = Field("us-east-1", description="S3 region, part of every signature.")
    s3_bucket: str = Field("milliner", description="Bucket that holds files, models, checkpoints and adapters.")
    s3_access_key: SecretStr = Field(SecretStr(""), description="S3 access key id.")
    s3_secret_key: SecretStr = Field(SecretStr(""), description="S3 secret access key.")
    presign_seconds: int = Field(3600, description="How long a presigned download URL lives.")

    max_file_bytes: int = Field(8 * 1024**3, description="Largest dataset that an upload may hold.")
    max_row_bytes: int = Field(4 * 1024**2, description="Longest line that a dataset may hold.")
    full_finetuning_bytes: int = Field(
        32 * 10**9, description="Most that full fine-tuning may hold at 22 bytes a parameter; larger bases get a LoRA."
    )
    retry_window_seconds: float = Field(
        300.0, description="A retry (x-stainless-retry-count > 0) of an identical request within this is the same job."
    )

    preview_seconds: float = Field(20.0, description="How long a request for a preview waits for a worker's answer.")

    lease_seconds: float = Field(60.0, description="How long a claim holds without a renewal.")
    heartbeat_seconds: float = Field(10.0, description="How often a worker renews its lease and reads desired_state.")
    fence_seconds: float = Field(45.0, description="Without a renewal for this long, a worker freezes its trainer.")
    sweep_seconds: float = Field(5.0, description="How often a sweeper looks for jobs nobody was told of.")
    rering_seconds: float = Field(30.0, description="First back-off before a queued job is announced again.")
    max_crashes: int = Field(3, description="Crashes after which a job ends as poison.")
    crash_backoff_seconds: float = Field(5.0, description="Wait before the attempt after a crash; doubled each time.")
    stop_seconds: float = Field(15.0, description="How long a trainer may take to checkpoint when asked to stop.")
    stuck_seconds: float = Field(3600.0, description="A job whose worker lives but gets nowhere for this long crashes.")
    notice_command: str | None = Field(
        None, description="Run all the time; exit code 0 says that this machine will go soon, and the worker drains."
    )
    notice_seconds: float = Field(5.0, description="How often `notice_command` runs, and how long it may take.")
    purge_seconds: float = Field(
        3600.0, description="How often a worker drops objects of the bucket that no row names."
    )
    orphan_seconds: float = Field(86400.0, description="Age at which an upload that never got its row is dropped.")
    trainer_command: str | None = Field(
        None, description="Command that starts a trainer; unset means `python -m worker.trainer.main`."
    )
    warm_seconds: float = Field(
        300.0, description="How long an idle trainer keeps its imports and its base in memory; 0 ends it with its job."
    )
    signing_key_file: Path | None = Field(
        None, description="PEM of the Ed25519 key that signs published adapters; unset leaves them unsigned."
    )

    integrations: Annotated[frozenset[TrackerKind], NoDecode] = Field(
        frozenset(), description="Trackers that jobs may name, of `wandb,mlflow`; `train` workers need what follows."
    )
    wandb_api_key: SecretStr | None = Field(None, description="Weights & Biases: the key that all runs are logged by.")
    wandb_base_url: str = Field("https://api.wandb.ai", description="Weights & Biases: where it is, if it is your own.")
    mlflow_tracking_uri: SecretStr | None = Field(
        None, description="MLflow: the server's URL; `http://user:password@host` where it asks for a password."
    )
    mlflow_token: SecretStr | None = Field(None, description="MLflow: a bearer token, where it asks for one.")

    cache_dir: Path = Field(
        Path.home() / ".cache" / "milliner", description="Base models by hash, and the work directories of attempts."
    )
    cache_bytes: int = Field(200 * 1024**3, description="Disk budget of the base-model cache; least used goes first.")
    min_free_bytes: int = Field(1024**3, description="Free disk under `cache_dir` below which a worker takes no job.")
    device_memory_bytes: int = Field(
        0, description="Memory that a training run may take; 0 means all that its device has."
    )
    torch_threads: int = Field(0, description="CPU threads of a trainer; 0 leaves the choice to torch.")
    log_level: str = Field("INFO", description="Lowest level that is logged.")
    log_json: bool = Field(True, description="Logs as JSON lines; false prints them for people.")
    fault: str | None = Field(
        None, description="For tests: a crash point and what happens there, such as `after_claim:kill`."
    )

    base_url: str | None = Field(None, description="Client: the API to talk to, such as http://127.0.0.1:8000/v1.")
    api_key: SecretStr | None = Field(None, description="Client: the key to send.")
    data: Path = Field(Path.home() / ".milliner", description="Folder of the local stack (`milliner up --data`).")

    @field_validator("integrations", mode="before")
    @classmethod
    def _names(cls, told: object) -> object:
        """`wandb,mlflow` from the environment."""
        return [name.strip() for name in told.split(",") if name.strip()] if isinstance(told, str) else told

    @model_validator(mode="after")
    def _times_in_order(self) -> Self:
        """A trainer must stand still before its lease ends, and not after one missed renewal."""
        if not 0 < self.heartbeat_seconds < self.fence_seconds < self.lease_seconds:
            found = f"{self.heartbeat_seconds:g}, {self.fence_seconds:g} and {self.lease_seconds:g}"
            raise ValueError(f"heartbeat, fence and lease seconds are {found}; allowed: each less than the next")
        return self


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The settings of this process, read once."""
    return Settings()
