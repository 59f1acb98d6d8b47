"""Every setting of every service: environment variables `TICKETRAIL_*`, or a `.env` file in the working directory.

Nothing reads the environment at import time: a process calls `Settings()` once, in its entry point, and passes the
result down. Durations end in `_seconds` or `_ms`, sizes in `_bytes`.
"""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.security.weak_secrets import passwords_in, weakness

_URLS_WITH_PASSWORDS = (
    "rabbitmq_url",
    "rabbitmq_management_url",
    "rabbitmq_watcher_url",
    "redis_url",
    "database_url",
    "database_writer_url",
    "database_api_url",
    "database_ops_url",
)


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="TICKETRAIL_", env_file=".env", extra="ignore", frozen=True)

    environment: Literal["development", "production"] = "development"
    home: Path = Path(".local")
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    instance: PositiveInt | Literal["auto"] = Field(
        1,
        description="number of this instance among its kind; names its journal and its own order number series. "
        "`auto`: the lowest that is free in this home (shared/rail/instance.py), for replicas that share one",
    )

    # Backends. One URL per database role: `migrate` creates the roles with the passwords that stand here.
    rabbitmq_url: str = Field(
        "amqp://ticketrail:ticketrail@127.0.0.1:56720/",
        description="or several with commas between, of the nodes of one cluster: the first that answers",
    )
    rabbitmq_management_url: str = Field(
        "http://ticketrail:ticketrail@127.0.0.1:56721", description="for `migrate`, which makes the user of the next"
    )
    rabbitmq_watcher_url: str = Field(
        "http://ticketrail_watcher:ticketrail@127.0.0.1:56721", description="of a user that may only look at queues"
    )
    redis_url: str = Field(
        "redis://127.0.0.1:56379/0",
        description="or several with commas between, of a primary and its replicas: the one that is the primary",
    )
    database_url: str = "postgresql://ticketrail_owner:ticketrail@127.0.0.1:54320/ticketrail"
    database_writer_url: str = "postgresql://ticketrail_writer:ticketrail@127.0.0.1:54320/ticketrail"
    database_api_url: str = "postgresql://ticketrail_api:ticketrail@127.0.0.1:54320/ticketrail"
    database_ops_url: str = "postgresql://ticketrail_ops:ticketrail@127.0.0.1:54320/ticketrail"

    # Where the services listen.
    host: str = "127.0.0.1"
    orders_port: PositiveInt = 8001
    sync_port: PositiveInt = 8002
    notifier_port: PositiveInt = 8003
    worker_port: PositiveInt = Field(8004, description="health of the sync worker")
    trusted_proxies: str = Field(
        "",
        description="addresses or networks, with commas between, whose X-Forwarded-For is believed "
        "(shared/http/client_address.py); empty: nobody's",
    )

    cors_origins: str = Field("", description="with commas between, or *; empty: no other origin's pages may call")
    # Token buckets (shared/http/limits.py); 0 a second: no limit.
    restaurant_per_second: NonNegativeFloat = 5_000.0
    restaurant_burst: PositiveInt = 10_000
    address_per_second: NonNegativeFloat = 5_000.0
    address_burst: PositiveInt = 10_000

    status_urls: dict[str, str] = Field(
        {}, description="for `ticketrail status` where services do not share a host: JSON, by orders, sync-worker, …"
    )

    # Who may call (shared/security/tokens.py).
    jwt_algorithm: Literal["HS256", "RS256", "EdDSA"] = "HS256"
    jwt_secret: str = Field("development-only-secret-change-me-please", description="for HS256: 32 bytes at least")
    jwt_private_key: str = Field(
        "", description="PEM, or the path of a file with it: for RS256 and EdDSA, where signed"
    )
    jwt_public_key: str = Field("", description="the same, where tokens are only verified")
    jwt_previous_key: str = Field(
        "", description="secret or public key that signed before: its tokens are good until they expire"
    )
    jwt_ttl_seconds: PositiveInt = 7 * 24 * 3600
    access_ttl_seconds: PositiveInt = Field(1_800, description="of the token that a sign-in gives")
    refresh_ttl_seconds: PositiveInt = 30 * 24 * 3600
    table_session_seconds: PositiveInt = Field(4 * 3600, description="how long a guest's token is good")
    tries_per_account: PositiveInt = Field(10, description="sign-ins in five minutes, of one account")
    tries_per_address: PositiveInt = Field(60, description="sign-ins in five minutes, from one address")
    sync_token: str = "development-only-sync-token"  # noqa: S105  (a default for development, refused in production)

    # The commit (shared/rail).
    publish_timeout_seconds: PositiveFloat = 1.5
    publish_batch_changes: PositiveInt = 256
    publishes_under_way: PositiveInt = Field(
        1, description="per lane; fewer make larger messages, which cost less: 2 cost a fifth of the throughput"
    )
    publishes_apart_ms: NonNegativeFloat = Field(
        5.0, description="per lane, from the beginning of one publish to the next; alone, a change goes at once"
    )
    claim_stale_seconds: PositiveFloat = 2.0
    claim_seconds: PositiveFloat = Field(1.0, description="how long a claim without an answer is sent again")
    reveal_seconds: PositiveFloat = 1.0
    journal_max_bytes: PositiveInt = 1 << 30
    journal_reserve_bytes: NonNegativeInt = Field(
        4 << 20, description="what the journal leaves free on its disk: to drain it takes room too"
    )
    orphans_seconds: PositiveFloat = Field(
        5.0, description="how often journals are looked for whose own instance is not there (shared/rail/orphans.py)"
    )
    settle_seconds: PositiveFloat = Field(
        3.0, description="how long a mirror that was lost stays cold at least: twice the publish timeout"
    )
    number_gap: PositiveInt = Field(
        100, description="order numbers skipped when the mirror was lost: those that may have been under way"
    )

    # Redis and PostgreSQL clients.
    redis_timeout_seconds: PositiveFloat = 0.5
    database_timeout_seconds: PositiveFloat = 5.0
    database_pool_size: PositiveInt = 8

    # Topology. Changing these names other queues; run `ticketrail migrate` afterwards.
    retry_steps_ms: tuple[PositiveInt, ...] = (1_000, 10_000, 60_000, 300_000)
    log_max_age: str = "7D"
    log_max_bytes: PositiveInt = 20_000_000_000
    log_segment_bytes: PositiveInt = 50_000_000

    # The sync worker.
    fence_interval_seconds: PositiveFloat = 5.0
    lane_consumers: PositiveInt = 2
    lane_prefetch: PositiveInt = 200
    batch_changes: PositiveInt = 500
    batch_wait_ms: PositiveFloat = Field(
        20.0, description="from the first change of a batch until it is written; what it costs is lag of the database"
    )
    ack_before_commit: bool = Field(
        False,
        description="for one test alone, and refused outside development: the PostgreSQL writer acknowledges what it "
        "has not committed, so that a worker that is killed loses changes, and the proof of tests/chaos must say so",
    )
    sink_away_seconds: PositiveFloat = Field(
        300.0, description="how long a batch is held before the consumers let go of their queues"
    )
    mirror_window_days: PositiveInt = 3
    reconcile_seconds: PositiveFloat = 2.0
    heal_seconds: PositiveFloat = Field(
        300.0,
        description="how often, and after how long, what is pending is looked for behind lanes that are empty",
    )
    cleanup_seconds: PositiveFloat = Field(3_600.0, description="how often what is over is taken away")
    dead_letter_retention_days: PositiveInt = Field(
        30, description="how long a dead letter that is resolved or discarded is kept; an open one stays"
    )
    pending_too_long_seconds: PositiveFloat = Field(
        10.0, description="after so long the reconciler asks PostgreSQL whether it has what the mirror calls pending"
    )

    pending_warning: PositiveInt = Field(100, description="of a restaurant: when more changes are pending, it is told")
    failed_warning: PositiveInt = Field(5, description="the same for those that have failed")
    threshold_seconds: PositiveFloat = Field(10.0, description="how often the worker looks at both")

    # Traces (shared/observability/tracing.py).
    trace_sample: float = Field(
        0.1, ge=0, le=1, description="share of traces that are kept; failed and slow ones are kept beside them; 0: off"
    )
    trace_slow_ms: PositiveFloat = Field(1_000.0, description="from when on a request, or a change's way, is slow")
    trace_slow_per_second: PositiveInt = Field(
        20, description="slow ones that a process keeps in a second at most: in a backlog everything is slow"
    )
    trace_file_bytes: PositiveInt = 20_000_000
    trace_files: PositiveInt = Field(4, description="older files kept beside the one that is written")
    otlp_endpoint: str = Field(
        "", description="OTLP over HTTP, such as http://collector:4318; empty: files in <home>/traces"
    )
    trace_query_url: str = Field("", description="Jaeger's query API, for `ticketrail trace`; empty: the files")

    # The notifier.
    window_seconds: PositiveFloat = 600.0
    window_changes: PositiveInt = 50_000
    window_bytes: PositiveInt = 256 << 20
    client_buffer_events: PositiveInt = Field(
        1_000, description="what may wait for one client; one that leaves more lying is told to resync and let go"
    )
    client_buffer_bytes: PositiveInt = 1 << 20
    client_connections: PositiveInt = Field(10_000, description="open connections at once; further ones wait")
    heartbeat_seconds: PositiveFloat = 15.0

    @model_validator(mode="after")
    def _no_weak_secrets(self) -> Self:
        """In production. A URL that is set to nothing is none of this service's: it has no secret to be weak."""
        if self.environment != "development" and len(self.jwt_secret.encode()) < 32 and self.jwt_algorithm == "HS256":
            raise ValueError("TICKETRAIL_JWT_SECRET is shorter than 32 bytes")
        if self.environment == "production":
            for name in ("jwt_secret", "sync_token") if self.jwt_algorithm == "HS256" else ("sync_token",):
                if wrong := weakness(getattr(self, name)):
                    raise ValueError(f"TICKETRAIL_{name.upper()} {wrong}")
            for name in _URLS_WITH_PASSWORDS:
                for password in passwords_in(url) if (url := getattr(self, name)) else ():
                    if wrong := weakness(password):
                        raise ValueError(f"the password in TICKETRAIL_{name.upper()} {wrong}")
        return self

    @model_validator(mode="after")
    def _nothing_that_loses_changes(self) -> Self:
        if self.ack_before_commit and self.environment != "development":
            raise ValueError("TICKETRAIL_ACK_BEFORE_COMMIT is for a test alone: it loses changes")
        return self

    def numbered(self, instance: int) -> Self:
        """The same for the instance that this process has become: where `auto` stood, its number."""
        return self.model_copy(update={"instance": instance})

    @property
    def instance_number(self) -> int:
        """Raises ValueError while it is still to be found (`auto`)."""
        if self.instance == "auto":
            raise ValueError("TICKETRAIL_INSTANCE=auto, and no number was leased yet")
        return self.instance

    @property
    def traces_path(self) -> Path:
        return self.home / "traces"

    @property
    def journal_folder(self) -> Path:
        return self.home / "journal"

    @property
    def journal_path(self) -> Path:
        return self.journal_folder / f"orders-{self.instance_number}.sqlite"
