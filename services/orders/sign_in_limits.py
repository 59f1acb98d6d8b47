"""Limits on sign-in, which stop somebody who guesses and not the people who work in the restaurant.

Only failures count. They are counted by (account, address). So an attacker at another address does not lock the
owner out, and a colleague who forgot a password does not lock out the other staff behind the same address.
Two looser totals stop guesses that spread out: of an account over many addresses, and from an address over many
accounts. An account that has signed in from an address before is not subject to the totals there.

An attempt takes its tokens before the password is checked, so that a thousand attempts at the same moment get no more
guesses than one after the other. It gives them back unless it failed. A caller who does not wait for the reply gets
nothing back.
"""

import asyncio
import hashlib
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from shared.errors import TooManyRequests, Unauthenticated
from shared.http.limits import Rate, TokenBucket, counted_as
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import Mirror
from shared.security.emails import plain_email
from shared.settings import Settings

_FAMILIAR_SECONDS = 30 * 24 * 3600


class SignInLimits:
    def __init__(self, mirror: Mirror, settings: Settings) -> None:
        def bucket(kind: str, within_window: int) -> TokenBucket:
            return TokenBucket(mirror, kind, Rate(within_window, within_window / settings.failure_window_seconds))

        self._mirror = mirror
        self._of_pair = bucket("sign-in", settings.sign_in_failures_per_account_and_address)
        self._of_account = bucket("sign-in-account", settings.sign_in_failures_per_account)
        self._of_address = bucket("sign-in-address", settings.sign_in_failures_per_address)
        self._of_table = bucket("table-session", settings.table_sessions_per_table_and_address)
        self._account_changes = bucket("account-change", settings.account_changes_per_address)

    @asynccontextmanager
    async def attempt(self, email: str, address: str) -> AsyncIterator[None]:
        """Counts a failure if the block raises Unauthenticated. Raises TooManyRequests before the block if the account
        has failed too often from this address, or if a total is used up."""
        account, origin = account_of(email), counted_as(address)
        pair = f"{account}:{origin}"
        await _take(self._of_pair, pair)
        taken = [(self._of_pair, pair)]
        try:
            for bucket, caller in ((self._of_account, account), (self._of_address, origin)):
                wait, _ = await bucket.take(caller)
                if not wait:
                    taken.append((bucket, caller))
                elif not await self._is_familiar(pair):
                    raise _too_many(wait)
            yield
        except Unauthenticated:
            raise
        except Exception:
            await _give_back(taken)
            raise
        await asyncio.gather(_give_back(taken), self._make_familiar(pair))

    async def count_account_change(self, address: str) -> None:
        """Counts a registration, a new user, or a change of an email or password. Raises TooManyRequests. They are
        limited because hashing is expensive and the reply reveals whether an email is in use."""
        await _take(self._account_changes, counted_as(address))

    async def count_table_session(self, table_id: str, address: str) -> None:
        """Counts the session of a guest at a table that exists. Raises TooManyRequests. The guests of a restaurant
        share an address, so each table has a number of its own."""
        await _take(self._of_table, f"{table_id}:{counted_as(address)}")

    async def count_unknown_table(self, address: str) -> None:
        """Counts a code of no table. Raises TooManyRequests."""
        await _take(self._of_address, f"table:{counted_as(address)}")

    async def _is_familiar(self, pair: str) -> bool:
        try:
            return await self._mirror.is_familiar(pair)
        except (MirrorUnavailable, MirrorInDoubt):
            return False

    async def _make_familiar(self, pair: str) -> None:
        with suppress(MirrorUnavailable, MirrorInDoubt):  # the next sign-in from there notes it
            await self._mirror.make_familiar(pair, _FAMILIAR_SECONDS)


def account_of(email: str) -> str:
    """Returns the name of an account in counters and logs, which does not show the email."""
    return hashlib.sha256(plain_email(email).encode()).hexdigest()[:32]


async def _take(bucket: TokenBucket, caller: str) -> None:
    wait, _ = await bucket.take(caller)
    if wait:
        raise _too_many(wait)


async def _give_back(taken: list[tuple[TokenBucket, str]]) -> None:
    await asyncio.gather(*(bucket.give_back(caller) for bucket, caller in taken))


def _too_many(wait: float) -> TooManyRequests:
    return TooManyRequests("too many attempts; try again later", retry_after=math.ceil(wait))
