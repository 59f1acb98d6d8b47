"""The address of the client behind proxies. `X-Forwarded-For` counts only from trusted proxies.

Every client can send this header. Without the rule it could choose the address by which its requests are limited.
"""

from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any

_Network = IPv4Network | IPv6Network


class TrustedProxies:
    def __init__(self, listed: str) -> None:
        """`listed`: addresses and networks separated by commas (TICKETRAIL_TRUSTED_PROXIES). Raises ValueError."""
        self._networks: tuple[_Network, ...] = tuple(
            ip_network(one.strip(), strict=False) for one in listed.split(",") if one.strip()
        )

    def client_of(self, scope: Any) -> str:
        """The client's address of an ASGI scope; empty when the server does not know it (a Unix socket).

        Reads the header from its end, over the trusted proxies, to the first other address. Everything before that
        address may be forged."""
        peer = scope["client"][0] if scope.get("client") else ""
        if not self._trusts(peer):
            return peer
        for hop in reversed(_forwarded(scope["headers"])):
            if not _is_address(hop):
                return peer  # no trusted proxy writes this
            peer = hop
            if not self._trusts(hop):
                break
        return peer

    def _trusts(self, address: str) -> bool:
        return _is_address(address) and any(ip_address(address) in network for network in self._networks)


def _forwarded(headers: Iterable[tuple[bytes, bytes]]) -> list[str]:
    lines = (value.decode("latin-1") for name, value in headers if name == b"x-forwarded-for")
    return [hop.strip() for line in lines for hop in line.split(",") if hop.strip()]


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True
