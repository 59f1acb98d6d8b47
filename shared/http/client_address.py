"""The address of the client behind proxies. `X-Forwarded-For` counts only if a trusted proxy sends it.

Every client can send this header. Without this rule, a client could choose the address for which its rate limit counts.
"""

from collections.abc import Iterable
from ipaddress import ip_address
from typing import Any

from shared.setting_fields import networks_in


class TrustedProxies:
    def __init__(self, listed: str) -> None:
        """`listed`: addresses and networks, separated by commas (TICKETRAIL_TRUSTED_PROXIES). Raises ValueError."""
        self._networks = networks_in(listed)

    def client_of(self, scope: Any) -> str:
        """Returns the address of the client from an ASGI scope, or an empty text if the server does not know it (a Unix
        socket).

        Reads the header from its end and skips the trusted proxies. The first other address is the client's. Everything
        before it may be forged.
        """
        peer = scope["client"][0] if scope.get("client") else ""
        if not self._trusts(peer):
            return peer
        for hop in reversed(_forwarded(scope["headers"])):
            if not _is_address(hop):
                return peer  # a trusted proxy always writes an address
            peer = hop
            if not self._trusts(hop):
                break
        return peer

    def _trusts(self, address: str) -> bool:
        if not self._networks or not _is_address(address):
            return False
        return any(ip_address(address) in network for network in self._networks)


def _forwarded(headers: Iterable[tuple[bytes, bytes]]) -> list[str]:
    lines = (value.decode("latin-1") for name, value in headers if name == b"x-forwarded-for")
    return [hop.strip() for line in lines for hop in line.split(",") if hop.strip()]


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True
