"""Declares and describes settings: the group, the unit, a sentence and the allowed values.

`.env.example`, `docs/settings.md` and the message for a wrong value are generated from these descriptions.
"""

import json
import re
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from urllib.parse import urlsplit

from annotated_types import Ge, Gt, Le, MinLen
from msgspec import Struct
from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.fields import FieldInfo
from pydantic_settings import NoDecode

from shared.host_urls import host_urls

PREFIX = "TICKETRAIL_"
MIN_PORT_BASE, MAX_PORT_BASE = 1023, 65_525
MIN_SECRET_BYTES = 32
"""The key of HS256 must be at least as long as its hash (RFC 7518, section 3.2)."""


class Group(Struct, frozen=True):
    """Settings that belong together. The documents print the sentence `about` below the title."""

    title: str
    about: str

    def setting(
        self,
        default: Any = ...,
        sentence: str = "",
        *,
        unit: str = "",
        allowed: str = "",
        default_text: str = "",
        secret: bool = False,
        **constraints: Any,
    ) -> Any:
        """Returns a pydantic field.

        sentence      one sentence that describes the setting
        unit          the unit of a number, in the plural: "seconds", "bytes"
        allowed       overrides the text that `allowed_values` derives from the type
        default_text  describes a default that depends on another setting
        secret        True if an error message must not repeat the value
        constraints   further arguments of pydantic's `Field`
        """
        described = Described(self.title, self.about, sentence, unit, allowed, default_text, secret)
        extra: Any = {"described": described}
        if "default_factory" not in constraints:
            constraints["default"] = default
        return Field(description=sentence, json_schema_extra=extra, **constraints)


class Words(Struct, frozen=True):
    """Metadata of a type: its allowed values in words, which complete the sentence "it must be …"."""

    text: str


class Described(Struct, frozen=True):
    group: str
    about: str
    sentence: str
    unit: str
    allowed: str
    default_text: str
    secret: bool


def description_of(field: FieldInfo) -> Described:
    """Returns the description of a field. Raises KeyError or TypeError for a field that no Group declared."""
    extra: Any = field.json_schema_extra
    described: Described = extra["described"]
    return described


def variable(name: str) -> str:
    """Returns the environment variable of a setting."""
    return PREFIX + name.upper()


# -- groups, in the order of the documents -----------------------------------------------------------------------

PROCESS = Group("Process", "The role of this process and the place of its files.")
COMMANDS = Group("Commands", "Settings that only the command `ticketrail` reads.")
BACKENDS = Group(
    "Backends",
    "Each role of the database has a URL of its own; `ticketrail migrate` creates the roles and the read-only user "
    "of RabbitMQ with the passwords in these URLs. An empty URL means that the service does not use it. "
    "docs/clusters-and-backups.md describes URLs of several hosts.",
)
CLIENTS = Group("Backend clients", "Time limits and connections.")
LISTENING = Group("Listening", "The addresses on which the services accept connections.")
LIMITS = Group("Rate limits", "Token buckets that all instances share. A rate of 0 switches the limit off.")
SIGN_IN = Group(
    "Tokens and sign-in",
    "Every service needs the same secret, or the public key. With a key pair only the orders service, which signs, "
    "needs the private key. Outside development, weak secrets are refused.",
)
COMMIT = Group("Commit", "Claiming, recording and revealing a change (shared/rail).")
TOPOLOGY = Group(
    "Queues and change log", "Run `ticketrail migrate` after a change, because other retry delays need other queues."
)
WORKER = Group("Sync worker", "Writing changes to PostgreSQL and the mirror.")
TRACES = Group("Traces", "See docs/tracing.md.")
NOTIFIER = Group("Notifier", "Push to terminals and browsers.")
SERVERS = Group(
    "Servers of `make run`",
    "Ports of the private servers that `make run` starts. Other processes only check the base.",
)


# -- allowed values ----------------------------------------------------------------------------------------------


def allowed_values(field: FieldInfo) -> str:
    """Returns the allowed values of a setting in words that complete the sentence "it must be …", such as "a whole
    number from 1 to 65535"."""
    return description_of(field).allowed or _words(field.annotation, field.metadata)


def _words(kind: Any, limits: list[Any]) -> str:
    for limit in limits:
        if isinstance(limit, Words):
            return limit.text
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _words(inner[0], [*inner[1:], *limits])
    if origin is Literal:
        return _either([str(value) for value in inner])
    if origin in (Union, UnionType):
        return _either([_words(part, limits) for part in inner if part is not NoneType])
    if kind is bool:
        return "true or false"
    if kind in (int, float):
        return ("a whole number" if kind is int else "a number") + _range(limits)
    if kind is str:
        return "a text"
    return f"a {kind.__name__.lower()}"


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _range(limits: list[Any]) -> str:
    least, above, most = None, None, None
    for limit in limits:
        # `Field(ge=…)` inside Annotated holds its limits in `metadata`.
        for bound in limit.metadata if isinstance(limit, FieldInfo) else [limit]:
            least = bound.ge if isinstance(bound, Ge) else least
            above = bound.gt if isinstance(bound, Gt) else above
            most = bound.le if isinstance(bound, Le) else most
    if most is not None and least is not None:
        return f" from {least} to {most}"
    if most is not None and above is not None:
        return f" above {above} and up to {most}"
    if least is not None:
        return f" of {least} or more"
    return "" if above is None else f" above {above}"


# -- types -------------------------------------------------------------------------------------------------------


def _from_json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


RETRY_PRESETS = {
    "growing": (1_000, 10_000, 60_000, 300_000),
    "every_30s": (30_000,) * 10,
    "every_5min": (300_000,) * 12,
}
"""Name of a retry schedule -> the delays before each retry, in milliseconds. Two of them are those of systems that
Ticketrail replaces."""


def _steps(value: Any) -> Any:
    return RETRY_PRESETS.get(value) or _from_json(value) if isinstance(value, str) else value


# These types decode JSON themselves, because pydantic-settings does not raise a ValidationError for broken JSON.
Steps = Annotated[
    tuple[Annotated[int, Gt(0)], ...],
    MinLen(1),
    NoDecode,
    BeforeValidator(_steps),
    Words(
        "a JSON list of whole numbers above 0, such as [1000, 10000], or the name of a schedule: growing (the default),"
        " every_30s (10 retries in 5 minutes), every_5min (12 retries in an hour)"
    ),
]
Urls = Annotated[
    dict[str, str],
    NoDecode,
    BeforeValidator(_from_json),
    Words(
        'a JSON object such as {"orders": "http://orders:8001"}, with the keys orders, sync-worker, sync-api, notifier'
    ),
]
_SERVICES = ("orders", "sync-worker", "sync-api", "notifier")


def _name_services(value: dict[str, str]) -> dict[str, str]:
    for name in value:
        if name not in _SERVICES:
            raise ValueError(f"{name!r} is no service")
    return value


ServiceUrls = Annotated[
    dict[str, str],
    NoDecode,
    BeforeValidator(_from_json),
    AfterValidator(_name_services),
    Words('a JSON object such as {"orders": "amqp://…"}, with the keys orders, sync-worker, sync-api, notifier'),
]
Port = Annotated[int, Field(ge=1, le=65_535)]
PortBase = Annotated[
    Annotated[int, Field(ge=MIN_PORT_BASE, le=MAX_PORT_BASE)] | None,
    BeforeValidator(lambda value: None if value == "" else value),  # .env.example contains it without a value
]
NonEmpty = Annotated[str, MinLen(1), Words("a text of at least one character")]


def _is_not_blank(value: Any) -> Any:
    # An empty path is the working directory, where `make reset` would remove files.
    if isinstance(value, str) and not value.strip():
        raise ValueError("it is empty")
    return value


Directory = Annotated[
    Path,
    BeforeValidator(_is_not_blank),
    Words("the path of a directory that this process can write, or can create"),
]


def url_of(*schemes: str, several: bool = False) -> AfterValidator:
    """Returns a validator that accepts an empty text or a URL with one of these schemes. With `several`, it also
    accepts several URLs separated by commas."""

    def check(value: str) -> str:
        for url in host_urls(value) if several and value else [value] if value else []:
            parts = urlsplit(url)
            if parts.scheme not in schemes or "://" not in url:
                raise ValueError(f"its scheme is not {_either(list(schemes))}")
            # A URL of PostgreSQL may name several hosts, each with a port, or a directory of sockets.
            if "postgresql" not in schemes and (not parts.hostname or (parts.port or 1) < 1):
                raise ValueError("it names no host")
        return value

    return AfterValidator(check)


def _is_long_enough(value: str) -> str:
    if len(value.encode()) < MIN_SECRET_BYTES:
        raise ValueError(f"it is shorter than {MIN_SECRET_BYTES} bytes")
    return value


Secret = Annotated[
    str,
    AfterValidator(_is_long_enough),
    Words(f"a text of at least {MIN_SECRET_BYTES} bytes, such as the output of `openssl rand -hex 32`"),
]


def networks_in(value: str) -> list[IPv4Network | IPv6Network]:
    """Returns the networks of a text such as "10.0.0.2, 10.1.0.0/16". Raises ValueError."""
    return [ip_network(one.strip(), strict=False) for one in value.split(",") if one.strip()]


def _are_networks(value: str) -> str:
    networks_in(value)
    return value


def _is_address(value: str) -> str:
    if ip_address(value).version == 6 and "%" in value:  # Python accepts a zone, the server does not
        raise ValueError("it has a zone")
    return value


_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s:][^/?#@\s]*")


def _are_origins(value: str) -> str:
    for origin in filter(None, map(str.strip, value.split(","))):
        # A browser sends the scheme, the host and the port, so an origin with more never matches.
        if origin != "*" and (not _ORIGIN.fullmatch(origin) or urlsplit(origin).port == 0):
            raise ValueError("it is not an origin")
    return value


Address = Annotated[str, AfterValidator(_is_address), Words("an IP address, such as 127.0.0.1 or ::1")]
Origins = Annotated[
    str,
    AfterValidator(_are_origins),
    Words("empty, * or origins separated by commas, such as https://pos.example,https://menu.example:8443"),
]
Networks = Annotated[
    str, AfterValidator(_are_networks), Words("addresses or networks separated by commas, such as 10.0.0.2,10.1.0.0/16")
]
HttpUrl = Annotated[str, url_of("http", "https"), Words("empty or a URL of http:// or https:// with a host")]
BrokerUrls = Annotated[
    str, url_of("amqp", "amqps", several=True), Words("URLs of amqp:// or amqps:// with a host, separated by commas")
]
RedisUrls = Annotated[
    str,
    url_of("redis", "rediss", several=True),
    Words("empty or URLs of redis:// or rediss:// with a host, separated by commas"),
]
DatabaseUrl = Annotated[str, url_of("postgresql", "postgres"), Words("empty or a URL of postgresql://")]
