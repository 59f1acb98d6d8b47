"""The address of the client: the header of a proxy counts only when the peer is a trusted proxy."""

import pytest

from shared.http.client_address import TrustedProxies


def scope(peer: str | None, *forwarded: str) -> dict[str, object]:
    headers = [(b"host", b"api"), *((b"x-forwarded-for", line.encode()) for line in forwarded)]
    return {"client": None if peer is None else (peer, 40_000), "headers": headers}


@pytest.mark.parametrize(
    ("trusted", "peer", "forwarded", "client"),
    [
        ("10.0.0.2", "10.0.0.2", ["203.0.113.9"], "203.0.113.9"),
        ("10.0.0.2", "10.0.0.3", ["203.0.113.9"], "10.0.0.3"),
        ("", "10.0.0.2", ["203.0.113.9"], "10.0.0.2"),
        ("10.0.0.0/24, fd00::/8", "fd00::5", ["203.0.113.9"], "203.0.113.9"),
        # The proxy appends the address that it sees to the addresses that the client sent.
        ("10.0.0.2", "10.0.0.2", ["1.2.3.4, 203.0.113.9"], "203.0.113.9"),
        ("10.0.0.2", "10.0.0.2", ["1.2.3.4", "203.0.113.9"], "203.0.113.9"),
        ("10.0.0.2, 192.0.2.1", "10.0.0.2", ["203.0.113.9, 192.0.2.1"], "203.0.113.9"),
        ("10.0.0.2", "10.0.0.2", ["not an address"], "10.0.0.2"),
        ("10.0.0.2", "10.0.0.2", [], "10.0.0.2"),
        ("10.0.0.2", None, ["203.0.113.9"], ""),
    ],
)
def test_the_client_is_the_address_that_the_last_trusted_hop_saw(
    trusted: str, peer: str | None, forwarded: list[str], client: str
) -> None:
    assert TrustedProxies(trusted).client_of(scope(peer, *forwarded)) == client


def test_a_trusted_proxy_that_is_not_an_address_is_refused() -> None:
    with pytest.raises(ValueError, match="gateway"):
        TrustedProxies("gateway")
