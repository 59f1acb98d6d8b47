"""The proof: statements that must hold after every fault has ended and no change is under way.

- Every acknowledged change is once in PostgreSQL, is part of its order in the mirror, and is at least once in the log.
- A refused change is in no store; an unanswered one is stored once at most.
- PostgreSQL and the mirror hold the same states; nothing is pending, on the retry ladder or dead.
- The versions of an order have no gap and one change each (both sides of a fork are kept, with an open conflict).
- No number is given twice, no tenant sees another one, and the ledger explains every change.
"""

import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from msgspec import Struct, field

from tests.chaos.load import Acknowledged, Load
from tests.chaos.rig import ChaosRig
from tests.chaos.screens import Screens
from tests.chaos.stores import OrderChange, StoreContents, read_stores


class Proof(Struct):
    acknowledged: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """All other violations."""
    forks: int = 0
    forked_creations: int = 0
    """Forks of version 1: a creation was repeated while neither store knew the order."""
    pushed: int = 0
    unexplained: list[str] = field(default_factory=list)
    """Change ids."""
    seconds_until_idle: float = 0.0

    @property
    def holds(self) -> bool:
        return not (self.lost or self.doubled or self.wrong or self.unexplained)


async def prove(rig: ChaosRig, load: Load, screens: Screens | None = None) -> Proof:
    contents = await read_stores(rig)
    proof = check_answers(load.acknowledged, load.refused, load.unknown, contents)
    proof.wrong += load.wrong
    if screens is not None:
        proof.pushed = sum(len(pushed) for pushed in screens.pushed.values())
        proof.wrong += [*screens.wrong, *pushed_to_other_restaurants(screens.pushed, contents)]
    return proof


def check_answers(
    acknowledged: Iterable[Acknowledged], refused: Mapping[str, str], unknown: Iterable[str], contents: StoreContents
) -> Proof:
    """Compares the replies with the stores; pure. `refused`: mark of a refused write -> its
    reply. `unknown`: marks of the writes whose outcome is unknown."""
    proof = Proof(unexplained=contents.unexplained)
    stores = _StoreIndex(contents)
    for one in acknowledged:
        proof.acknowledged += 1
        (_payment if one.kind == "paid" else _change)(proof, stores, one)
    for mark, reply in refused.items():
        proof.wrong += [f"refused, but present: {where} ({reply})" for where in stores.stores_with(mark)]
    for mark in unknown:
        places = {(one.order, one.version) for one in stores.wrote[mark]}
        orders = {order for order, _ in places}
        if len(orders) > 1 or len(places) > 1 or contents.payments[mark] > 1:
            proof.doubled.append(f"without a reply, and stored more than once: {mark} {sorted(places)}")
    _versions(proof, contents)
    proof.wrong += [f"order number {one}" for one in contents.repeated_numbers]
    proof.wrong += [f"dead: {one}" for one in contents.dead]
    proof.wrong += [f"mirror: {one}" for one in contents.differs]
    return proof


class _StoreIndex:
    """The content of all stores, indexed for the proof."""

    def __init__(self, contents: StoreContents) -> None:
        self.contents = contents
        self.wrote = _by_mark(contents.changes)
        self.logged = _by_mark(contents.logged)
        self.logged_ids = {one.change for one in contents.logged}
        self.logged_payments = {id_: one for one in reversed(contents.logged) for id_ in one.payments}
        """Payment -> the first change that carries it."""
        self._notes = {
            **{one.notes: f"the mirror, as {one.change}" for one in contents.mirror.values()},
            **{one.notes: f"the log, {one}" for one in contents.logged},
            **{one.notes: f"PostgreSQL, {one}" for one in contents.changes},
        }

    def stores_with(self, mark: str) -> list[str]:
        found = [self._notes[mark]] if mark in self._notes else []
        if self.contents.payments[mark]:
            found.append("PostgreSQL, a payment")
        if mark in self.logged_payments:
            found.append(f"the log, a payment of {self.logged_payments[mark]}")
        if any(mark in one.payments for one in self.contents.mirror.values()):
            found.append("the mirror, a payment")
        return found


def _by_mark(changes: Iterable[OrderChange]) -> dict[str | None, list[OrderChange]]:
    found: dict[str | None, list[OrderChange]] = defaultdict(list)
    for one in changes:
        if one.wrote_notes:
            found[one.notes].append(one)
    return found


def _change(proof: Proof, stores: _StoreIndex, one: Acknowledged) -> None:
    written = stores.wrote[one.mark]
    mine = [change for change in written if change.order == one.order]
    name = f"{one.kind} {one.order} ({one.mark})"
    if not mine:
        logged = stores.logged[one.mark]
        proof.lost.append(f"{name}: not in PostgreSQL; {logged[0] if logged else 'not in the log either'}")
        return
    if len(written) > len(mine) or (one.kind == "changed" and len(mine) > 1):
        proof.doubled.append(f"{name}: {len(written)} times")
    # A creation that was repeated while neither store knew the order is a fork of version 1; the log has both sides.
    proof.lost += [f"{name}: not in the log: {change}" for change in mine if change.change not in stores.logged_ids]
    if one.version and all(change.version != one.version for change in mine):
        proof.wrong.append(f"{name}: the reply says version {one.version}, the store has {mine[0]}")
    head = stores.contents.mirror.get(one.order)
    if head is None or head.version < mine[0].version:
        proof.lost.append(f"{name}: not in the mirror, whose head is {head}")
    elif any(change.change == head.change for change in mine) and head.notes != one.mark:
        proof.lost.append(f"{name}: its notes in the mirror are {head.notes}")


def _payment(proof: Proof, stores: _StoreIndex, one: Acknowledged) -> None:
    head = stores.contents.mirror.get(one.order)
    counts = {
        "PostgreSQL": stores.contents.payments[one.mark],
        "the mirror": 0 if head is None else head.payments.count(one.mark),
        "the log": int(one.mark in stores.logged_payments),
    }
    for where, count in counts.items():
        if count != 1:
            list_ = proof.doubled if count else proof.lost
            list_.append(f"payment {one.mark} of {one.order}: {count} times in {where}")


def _versions(proof: Proof, contents: StoreContents) -> None:
    by_version = Counter((one.order, one.version) for one in contents.changes)
    versions: dict[str, set[int]] = defaultdict(set)
    for (order, version), count in by_version.items():
        versions[order].add(version)
        if count > 1:
            proof.forks += 1
            proof.forked_creations += version == 1
            if (order, version) not in contents.conflicts:
                proof.doubled.append(f"version {version} of {order} exists {count} times without an open conflict")
    for order, found in versions.items():
        if found != set(range(1, max(found) + 1)):
            proof.wrong.append(f"versions of {order} have a gap: {sorted(found)}")


def pushed_to_other_restaurants(pushed: Mapping[str, Mapping[str, int]], contents: StoreContents) -> list[str]:
    """Names the changes that were pushed to another restaurant. `pushed`: restaurant -> change -> number of pushes. The
    stores say which restaurant owns a change; the event itself is not trusted."""
    owners = {one.change: one.restaurant for one in (*contents.logged, *contents.changes)}
    wrong = [
        f"change {change} of restaurant {owners[change]} was pushed to {restaurant}"
        for restaurant, changes in pushed.items()
        for change in changes
        if owners.get(change, restaurant) != restaurant
    ]
    busy = set(owners.values())
    return wrong + [f"nothing was pushed to {one}" for one, changes in pushed.items() if one in busy and not changes]


def journal_of(rig: ChaosRig, instance: int) -> int:
    """Counts the entries in the journal file of a stopped service."""
    with sqlite3.connect(rig.system.directory / "journal" / f"orders-{instance}.sqlite") as db:
        return int(db.execute("select count(*) from entries").fetchone()[0])
