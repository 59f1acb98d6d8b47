"""Every setting of every service: environment variables `TICKETRAIL_*`, or `.env` in the working directory.

Nothing reads the environment at import time. A process calls `Settings.load()` once, in its entry point, and passes
the result down. Durations end in `_seconds`, `_ms` or `_days`, sizes in `_bytes`. `make settings` writes `.env.example`
and `docs/settings.md` from this file and shared/backend_settings.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from shared.backend_settings import BackendSettings
from shared.security.production import default_algorithm, default_keys_in_reach, refusals
from shared.setting_fields import (
    CLIENTS,
    COMMIT,
    LIMITS,
    LISTENING,
    NOTIFIER,
    RETRY_PRESETS,
    SERVERS,
    SIGN_IN,
    TOPOLOGY,
    TRACES,
    WORKER,
    Address,
    HttpUrl,
    Networks,
    NonEmpty,
    Origins,
    Port,
    PortBase,
    Secret,
    Steps,
    variable,
)
from shared.settings_loading import SettingsError, load


def _default_trace_sample(validated: Mapping[str, Any]) -> float:
    return 1.0 if validated.get("environment") == "development" else 0.1


def _default_registration(validated: Mapping[str, Any]) -> str:
    return "open" if validated.get("environment") == "development" else "closed"


class Settings(BackendSettings):
    makes_own_secrets: ClassVar[bool] = False
    """True for settings whose reader creates a secret that is not set."""

    redis_timeout_seconds: PositiveFloat = CLIENTS.setting(
        0.5, "A command of the mirror fails after this time.", unit="seconds"
    )
    database_timeout_seconds: PositiveFloat = CLIENTS.setting(
        5.0, "A statement of PostgreSQL, or waiting for a connection, fails after this time.", unit="seconds"
    )
    database_pool_size: PositiveInt = CLIENTS.setting(
        8, "The maximum number of connections that a process opens for a role.", unit="connections"
    )

    host: Address = LISTENING.setting("127.0.0.1", "The address on which the services listen.")
    orders_port: Port = LISTENING.setting(8001, "The port of the orders API.")
    sync_port: Port = LISTENING.setting(8002, "The port of the sync API.")
    notifier_port: Port = LISTENING.setting(8003, "The port of the notifier.")
    worker_port: Port = LISTENING.setting(8004, "The port for health and metrics of the sync worker.")
    trusted_proxies: Networks = LISTENING.setting(
        "",
        "Services trust X-Forwarded-For only from these peers; if empty, from none.",
    )
    cors_origins: Origins = LISTENING.setting("", "The origins whose pages may call the APIs; if empty, none may.")

    restaurant_requests_per_second: NonNegativeFloat = LIMITS.setting(
        5_000.0, "The average rate of requests that a restaurant may send.", unit="requests per second"
    )
    restaurant_burst_requests: PositiveInt = LIMITS.setting(
        10_000, "The number of requests that a restaurant may send at once.", unit="requests"
    )
    address_requests_per_second: NonNegativeFloat = LIMITS.setting(
        5_000.0, "The average rate of requests that a client address may send.", unit="requests per second"
    )
    address_burst_requests: PositiveInt = LIMITS.setting(
        10_000, "The number of requests that a client address may send at once.", unit="requests"
    )
    client_connections: PositiveInt = LIMITS.setting(
        10_000,
        "The maximum number of open connections of a service; further ones wait. A stream above 90 % of them gets 503.",
        unit="connections",
    )
    body_timeout_seconds: PositiveFloat = LIMITS.setting(
        10.0, "The time in which the body of a request must arrive; a large body has more.", unit="seconds"
    )
    body_bytes_per_second: PositiveInt = LIMITS.setting(
        20_000,
        "The least rate of a body: it has a second more for each part of this size.",
        unit="bytes per second",
    )
    address_open_bodies: PositiveInt = LIMITS.setting(
        100,
        "The number of requests of a client address whose bodies may be unfinished at once; a further one ends the "
        "oldest.",
        unit="requests",
    )

    jwt_secret: Secret = SIGN_IN.setting(
        "development-only-secret-change-me-please",
        "The secret of HS256.",
        secret=True,
    )
    jwt_private_key: str = SIGN_IN.setting(
        "",
        "The key that signs with RS256 or EdDSA.",
        allowed="empty or a private key as PEM, or the path of a file with it",
        secret=True,
    )
    jwt_public_key: str = SIGN_IN.setting(
        "",
        "The key that verifies tokens if no private key is set.",
        allowed="empty or a public key as PEM, or the path of a file with it",
        secret=True,
    )
    jwt_previous_key: str = SIGN_IN.setting(
        "",
        "The secret or public key that signed before a rotation; its tokens stay valid until they expire.",
        allowed="empty, a secret, a key as PEM, or the path of a file with a key",
        secret=True,
    )
    jwt_algorithm: Literal["HS256", "RS256", "EdDSA"] = SIGN_IN.setting(
        sentence="HS256 signs with the secret, RS256 and EdDSA with the private key.",
        default_factory=default_algorithm,
        default_text="EdDSA if a private or public key is set, otherwise HS256",
    )
    jwt_issuer: NonEmpty = SIGN_IN.setting("ticketrail", "The claim `iss` that tokens carry and must carry.")
    jwt_audience: NonEmpty = SIGN_IN.setting("ticketrail", "The claim `aud` that tokens carry and must carry.")
    cli_token_ttl_seconds: PositiveInt = SIGN_IN.setting(
        24 * 3600, "The lifetime of a token that `ticketrail token` prints.", unit="seconds", le=24 * 3600
    )
    access_token_ttl_seconds: PositiveInt = SIGN_IN.setting(
        1_800, "The lifetime of the access token that a sign-in returns.", unit="seconds"
    )
    refresh_token_ttl_seconds: PositiveInt = SIGN_IN.setting(
        30 * 24 * 3600, "The lifetime of the refresh token that a sign-in returns.", unit="seconds"
    )
    guest_token_ttl_seconds: PositiveInt = SIGN_IN.setting(4 * 3600, "The lifetime of a guest's token.", unit="seconds")
    failure_window_seconds: PositiveFloat = SIGN_IN.setting(
        300.0, "The window of the following limits: one that is used up is whole again after this time.", unit="seconds"
    )
    guest_orders_per_minute: PositiveInt = SIGN_IN.setting(
        20, "The number of orders that a guest session may place within a minute.", unit="orders"
    )
    sign_in_failures_per_account_and_address: PositiveInt = SIGN_IN.setting(
        10,
        "The maximum number of failed sign-ins for an account from one client address within the window.",
        unit="failures",
    )
    sign_in_failures_per_account: PositiveInt = SIGN_IN.setting(
        100,
        "The maximum number of failed sign-ins for an account within the window, from addresses that it has not "
        "signed in from before.",
        unit="failures",
    )
    sign_in_failures_per_address: PositiveInt = SIGN_IN.setting(
        1_000,
        "The maximum number of failed sign-ins from a client address within the window, for accounts that have not "
        "signed in from it before.",
        unit="failures",
    )
    registration: Literal["open", "invitation", "closed"] = SIGN_IN.setting(
        sentence="How a restaurant may register: `open` allows it to everybody, `invitation` needs a code of "
        "`ticketrail restaurant invite`, `closed` leaves only the command `ticketrail restaurant add`.",
        default_factory=_default_registration,
        default_text="open in development, closed in production",
    )
    account_changes_per_address: PositiveInt = SIGN_IN.setting(
        60,
        "The maximum number of registrations, new users and changed emails or passwords from a client address within "
        "the window.",
        unit="changes",
    )
    table_sessions_per_table_and_address: PositiveInt = SIGN_IN.setting(
        100,
        "The maximum number of sessions of guests at one table from a client address within the window.",
        unit="sessions",
    )
    api_key_failures_per_prefix_and_address: PositiveInt = SIGN_IN.setting(
        10,
        "The maximum number of wrong API keys with one prefix from a client address within the window.",
        unit="failures",
    )
    api_key_failures_per_address: PositiveInt = SIGN_IN.setting(
        60, "The maximum number of wrong API keys from a client address within the window.", unit="failures"
    )

    publish_timeout_seconds: PositiveFloat = COMMIT.setting(
        1.5,
        "A change goes to the journal if it has no publisher confirm after this time (longer for many bytes).",
        unit="seconds",
    )
    publish_max_changes: PositiveInt = COMMIT.setting(
        256, "The maximum number of changes in one message.", unit="changes"
    )
    publish_concurrency: PositiveInt = COMMIT.setting(
        1,
        "The maximum number of publishes of a lane that wait for a confirm at the same time; fewer publishes make "
        "larger messages, which cost less (2 publishes cost a fifth of the throughput).",
        unit="publishes",
    )
    publish_interval_ms: NonNegativeFloat = COMMIT.setting(
        5.0,
        "The minimum time between the starts of two publishes of a lane; a single change does not wait.",
        unit="milliseconds",
    )
    claim_stale_seconds: PositiveFloat = COMMIT.setting(
        2.0, "A claim of this age is stale, and the sync worker finishes it.", unit="seconds"
    )
    claim_timeout_seconds: PositiveFloat = COMMIT.setting(
        1.0, "A claim that gets no answer is repeated for this time.", unit="seconds"
    )
    reveal_timeout_seconds: PositiveFloat = COMMIT.setting(
        1.0, "A reply waits at most this long for the mirror, and then says `visible: false`.", unit="seconds"
    )
    journal_max_bytes: PositiveInt = COMMIT.setting(
        1 << 30, "A journal of this size refuses further changes with 503.", unit="bytes"
    )
    journal_reserve_bytes: NonNegativeInt = COMMIT.setting(
        4 << 20,
        "The space that the journal leaves free on its disk, because draining it needs space too.",
        unit="bytes",
    )
    orphaned_journal_scan_seconds: PositiveFloat = COMMIT.setting(
        5.0, "The interval at which an instance searches for orphaned journals and drains them.", unit="seconds"
    )
    mirror_settle_seconds: PositiveFloat = COMMIT.setting(
        3.0,
        "A mirror that lost its data stays cold at least this long: a change that it had claimed is recorded or given "
        "up by then (1 s until its publish, 2 s until the confirm).",
        unit="seconds",
    )

    retry_steps_ms: Steps = TOPOLOGY.setting(
        RETRY_PRESETS["growing"],
        "The delays before each retry of a change that could not be written. Run `ticketrail migrate` after a change: "
        "each delay has a queue.",
        unit="milliseconds",
    )
    change_log_max_age: str = TOPOLOGY.setting(
        "7D",
        "The change log deletes segments of this age.",
        allowed="a whole number followed by Y, M, D, h, m or s, such as 7D",
        pattern=r"^[1-9][0-9]*[YMDhms]$",
    )
    change_log_max_bytes: PositiveInt = TOPOLOGY.setting(
        20_000_000_000, "The change log deletes its oldest segments above this size.", unit="bytes"
    )
    change_log_segment_bytes: PositiveInt = TOPOLOGY.setting(
        50_000_000, "The size of a segment of the change log.", unit="bytes"
    )

    heartbeat_interval_seconds: PositiveFloat = WORKER.setting(
        5.0,
        "The interval of heartbeats through every lane and the change log; three missed ones count as a failure.",
        unit="seconds",
    )
    lane_consumers: PositiveInt = WORKER.setting(2, "The number of consumers of each lane.", unit="consumers")
    lane_prefetch: PositiveInt = WORKER.setting(
        100, "The maximum number of unacknowledged messages of one consumer of a lane.", unit="messages"
    )
    batch_max_changes: PositiveInt = WORKER.setting(
        500, "The maximum number of changes that are written in one transaction.", unit="changes"
    )
    batch_wait_ms: PositiveFloat = WORKER.setting(
        20.0,
        "A batch collects changes for this time after its first change, which adds to the sync lag.",
        unit="milliseconds",
    )
    sink_hold_seconds: PositiveFloat = WORKER.setting(
        300.0,
        "A batch is held for this time while PostgreSQL is unavailable; then the consumers unsubscribe.",
        unit="seconds",
    )
    mirror_window_days: PositiveInt = WORKER.setting(
        3, "The mirror keeps closed orders for this many days; older ones are read from PostgreSQL.", unit="days"
    )
    reconcile_interval_seconds: PositiveFloat = WORKER.setting(
        2.0, "The interval at which the reconciler looks for stale claims and open conflicts.", unit="seconds"
    )
    lost_message_seconds: PositiveFloat = WORKER.setting(
        300.0,
        "A change that is pending in the mirror for this time, and that neither the ledger nor a dead letter explains, "
        "is recorded again.",
        unit="seconds",
    )
    cleanup_interval_seconds: PositiveFloat = WORKER.setting(
        3_600.0, "The interval at which expired records are deleted.", unit="seconds"
    )
    dead_letter_retention_days: PositiveInt = WORKER.setting(
        30, "A dead letter is deleted this many days after it was resolved or discarded; open ones stay.", unit="days"
    )
    pending_warning_changes: PositiveInt = WORKER.setting(
        100,
        "The log, a metric and the sync status warn if a restaurant has more pending changes than this.",
        unit="changes",
    )
    failed_warning_changes: PositiveInt = WORKER.setting(
        5,
        "The log, a metric and the sync status warn if a restaurant has more failed changes than this.",
        unit="changes",
    )
    threshold_interval_seconds: PositiveFloat = WORKER.setting(
        10.0, "The interval at which the sync worker checks both numbers for these warnings.", unit="seconds"
    )

    trace_sample: float = TRACES.setting(
        sentence="The share of traces that is kept in addition to failed and slow ones; 0 switches tracing off.",
        default_factory=_default_trace_sample,
        default_text="1 in development, 0.1 in production",
        ge=0,
        le=1,
    )
    trace_slow_ms: PositiveFloat = TRACES.setting(
        1_000.0,
        "A trace is slow if its request, or the path of its change to PostgreSQL, takes longer than this.",
        unit="milliseconds",
    )
    trace_slow_per_second: PositiveInt = TRACES.setting(
        20,
        "The maximum number of slow traces that a process keeps, because everything is slow during a backlog.",
        unit="traces per second",
    )
    otlp_endpoint: HttpUrl = TRACES.setting(
        "",
        "The URL to which spans are sent by OTLP over HTTP; if empty, they go to files in <home>/traces.",
    )
    trace_query_url: HttpUrl = TRACES.setting(
        "",
        "The URL of Jaeger's query API for `ticketrail trace`; if empty, the command reads the files.",
    )
    trace_file_bytes: PositiveInt = TRACES.setting(
        20_000_000, "A trace file of this size is closed and the next one begins.", unit="bytes"
    )
    trace_files: PositiveInt = TRACES.setting(
        4, "The number of closed trace files that each process keeps.", unit="files"
    )

    replay_window_seconds: PositiveFloat = NOTIFIER.setting(
        600.0, "The maximum age of a cursor from which a client can resume.", unit="seconds"
    )
    replay_window_changes: PositiveInt = NOTIFIER.setting(
        50_000, "The maximum number of changes that are kept for clients that resume.", unit="changes"
    )
    replay_window_bytes: PositiveInt = NOTIFIER.setting(
        256 << 20, "The maximum memory for the changes that are kept for clients that resume.", unit="bytes"
    )
    client_buffer_events: PositiveInt = NOTIFIER.setting(
        1_000,
        "The maximum number of events that wait for a client; a client that reads too slowly gets a `resync` and is "
        "disconnected.",
        unit="events",
    )
    client_buffer_bytes: PositiveInt = NOTIFIER.setting(
        1 << 20, "The maximum memory for the events that wait for a client.", unit="bytes"
    )
    streams_per_user: PositiveInt = NOTIFIER.setting(
        50, "The maximum number of event streams that a user may have open at an instance.", unit="streams"
    )
    streams_per_guest_session: PositiveInt = NOTIFIER.setting(
        4, "The maximum number of event streams that a guest session may have open at an instance.", unit="streams"
    )
    streams_per_restaurant: PositiveInt = NOTIFIER.setting(
        500, "The maximum number of event streams that a restaurant may have open at an instance.", unit="streams"
    )
    push_keepalive_seconds: PositiveFloat = NOTIFIER.setting(
        15.0,
        "The interval at which an idle event stream sends a comment, so that proxies keep it open.",
        unit="seconds",
    )

    port_base: PortBase = SERVERS.setting(
        None,
        "Moves every port of a system: orders listens one above the base, and sync, notifier, worker, PostgreSQL, "
        "Redis, RabbitMQ, its management API, epmd and Erlang distribution follow. The setting of one port overrides "
        "it. A base below 32000 is best, because Linux uses the ports from 32768 on for outgoing connections.",
        default_text="the ports below",
    )

    @classmethod
    def load(cls) -> Self:
        """Reads the environment and `.env`. Raises SettingsError, which names the wrong settings and their allowed
        values."""
        return load(cls)

    @model_validator(mode="after")
    def _refuse_what_is_unsafe(self) -> Self:
        """Raises ValueError with the first reason."""
        if wrong := next(default_keys_in_reach(self), None):
            raise ValueError(wrong)
        if self.environment == "production" and (wrong := next(refusals(self), None)):
            raise ValueError(wrong)
        return self

    def require(self, name: str) -> None:
        """Raises SettingsError if the setting is an empty URL, because this process needs that backend."""
        if not getattr(self, name):
            raise SettingsError(f"{variable(name)} is empty, but this process needs it")

    def numbered(self, instance: int) -> Self:
        """Returns a copy with the leased number of this process in place of `auto`."""
        return self.model_copy(update={"instance": instance})

    @property
    def instance_number(self) -> int:
        """The number of this instance. Raises ValueError if it is `auto` and no number was leased yet."""
        if self.instance == "auto":
            raise ValueError(f"{variable('instance')} is auto, and no number was leased yet")
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
