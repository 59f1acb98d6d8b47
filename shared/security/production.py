"""The settings that production refuses, and those that every environment refuses, each with the reason in one
sentence."""

from collections.abc import Iterator, Mapping
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

from shared.host_urls import host_urls
from shared.security.weak_secrets import passwords_in, weakness
from shared.setting_fields import networks_in, variable

if TYPE_CHECKING:
    from shared.settings import Settings

_USE_RANDOM = "use a random text, such as the output of `openssl rand -hex 32`"
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


_TTLS = ("access_token_ttl_seconds", "refresh_token_ttl_seconds", "guest_token_ttl_seconds")
_RATES = ("restaurant_requests_per_second", "address_requests_per_second")
_MAX_TTL_SECONDS = 30 * 24 * 3600
_UNVERIFIED = {
    "no_verify_ssl": ("1", "true", "yes", "on"),
    "ssl_cert_reqs": ("none", "optional"),
    "ssl_check_hostname": ("0", "false", "no"),
    "sslmode": ("allow", "prefer", "require"),  # PostgreSQL's words for TLS with any certificate
}
"""Parameters of URLs that switch the check of a certificate off, with the values that do so."""


def default_algorithm(validated: Mapping[str, Any]) -> str:
    """Returns the algorithm of tokens for settings that name none: a key pair is better than a shared secret."""
    return "EdDSA" if validated.get("jwt_private_key") or validated.get("jwt_public_key") else "HS256"


def default_keys_in_reach(settings: "Settings") -> Iterator[str]:
    """Yields a sentence if the secret that signs tokens still has its default, which everybody can read in our
    repository, and other machines can reach the service."""
    if settings.makes_own_secrets or ip_address(settings.host).is_loopback:
        return
    if settings.jwt_algorithm == "HS256" and settings.jwt_secret == type(settings).model_fields["jwt_secret"].default:
        yield (
            f"{variable('jwt_secret')} has its default, which everybody knows, and {variable('host')} is "
            f"{settings.host}; {_USE_RANDOM}, or listen on 127.0.0.1"
        )


def refusals(settings: "Settings") -> Iterator[str]:
    """Yields a sentence for each setting that production refuses. An empty URL has no secret, because the service does
    not use it."""
    yield from _weak_secrets(settings)
    yield from _shared_secrets(settings)
    if "*" in [origin.strip() for origin in settings.cors_origins.split(",")]:
        yield f"{variable('cors_origins')} contains *, so every page could call the APIs; list your origins"
    yield from _every_address(settings)
    for name in _RATES:
        if not getattr(settings, name):
            yield f"{variable(name)} is 0, which switches the limit off; set a rate"
    for name in _TTLS:
        if getattr(settings, name) > _MAX_TTL_SECONDS:
            yield f"{variable(name)} is longer than 30 days ({_MAX_TTL_SECONDS} seconds)"
    for name in _URLS_WITH_PASSWORDS:
        for url in host_urls(getattr(settings, name)) if getattr(settings, name) else ():
            for parameter, value in parse_qsl(urlsplit(url).query):
                if value.lower() in _UNVERIFIED.get(parameter, ()):
                    yield f"{variable(name)} has {parameter}={value}, which trusts every server; check certificates"


def _every_address(settings: "Settings") -> Iterator[str]:
    """Yields a sentence if every client is a trusted proxy, and could thus choose the address for which it counts."""
    listed = networks_in(settings.trusted_proxies)
    # Neighbours are joined, because 0.0.0.0/1 and 128.0.0.0/1 are every address too.
    joined: list[IPv4Network | IPv6Network] = [
        *collapse_addresses(one for one in listed if isinstance(one, IPv4Network)),
        *collapse_addresses(one for one in listed if isinstance(one, IPv6Network)),
    ]
    for network in joined:
        if network.prefixlen == 0:
            yield f"{variable('trusted_proxies')} contains {network}, which is every address; list your proxies"


def _shared_secrets(settings: "Settings") -> Iterator[str]:
    """Yields a sentence if the key that signs tokens is also another secret, whose owner could then sign tokens."""
    if settings.jwt_algorithm != "HS256":
        return
    others = {variable(name): passwords_in(url) for name in _URLS_WITH_PASSWORDS if (url := getattr(settings, name))}
    for name, secrets in others.items():
        if settings.jwt_secret in secrets:
            yield f"{variable('jwt_secret')} is also the secret in {name}; {_USE_RANDOM}"


def _weak_secrets(settings: "Settings") -> Iterator[str]:
    if settings.jwt_algorithm == "HS256" and (wrong := weakness(settings.jwt_secret)):
        yield f"{variable('jwt_secret')} {wrong}; {_USE_RANDOM}"
    for name in _URLS_WITH_PASSWORDS:
        for password in passwords_in(url) if (url := getattr(settings, name)) else ():
            if wrong := weakness(password):
                yield f"the password in {variable(name)} {wrong}; {_USE_RANDOM}"
