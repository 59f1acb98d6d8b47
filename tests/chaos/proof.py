"""What must be true after every fault has ended and no change is under way.

- Every acknowledged change is once in PostgreSQL, is part of its order in the mirror, and is at least once in the log.
- A refused change is in no store; an unanswered one is stored once at most.
- PostgreSQL and the mirror hold the same; nothing is pending, on the retry ladder or dead.
- The versions of an order have no gap and one change each (both sides of a fork are kept, with an open conflict).
- No number is given twice, no tenant sees another one, and the ledger explains every change.
"""

import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from msgspec import Struct, field

from tests.chaos.load import Acknowledged, Load
from tests.chaos.rig import Rig
from tests.chaos.seen import Seen, Step, look
from tests.chaos.watch import Watch


class Proof(Struct):
    acknowledged: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """All other violations."""
    forks: int = 0
    forked_creations: int = 0
    """The forks of creations that were repeated while neither store knew them."""
    pushed: int = 0
    unexplained: list[str] = field(default_factory=list)
    """Change ids."""
    seconds_to_rest: float = 0.0

    @property
    def holds(self) -> bool:
        return not (self.lost or self.doubled or self.wrong or self.unexplained)


async def prove(rig: Rig, load: Load, watch: Watch | None = None) -> Proof:
    seen = await look(rig)
    proof = judge(load.acknowledged, load.refused, load.unknown, seen)
    proof.wrong += load.wrong
    if watch is not None:
        proof.pushed = sum(len(pushed) for pushed in watch.pushed.values())
        proof.wrong += [*watch.wrong, *pushed_to_strangers(watch.pushed, seen)]
    return proof


def judge(
    acknowledged: Iterable[Acknowledged], refused: Mapping[str, str], unknown: Iterable[str], seen: Seen
) -> Proof:
    """Checks the answers against the stores; pure. `refused`: mark -> the answer; `unknown`: marks."""
    proof = Proof(unexplained=seen.unexplained)
    stores = _Stores(seen)
    for one in acknowledged:
        proof.acknowledged += 1
        (_payment if one.what == "paid" else _change)(proof, stores, one)
    for mark, said in refused.items():
        proof.wrong += [f"refused, and there all the same: {where} ({said})" for where in stores.whereabouts(mark)]
    for mark in unknown:
        places = {(one.order, one.version) for one in stores.wrote[mark]}
        orders = {order for order, _ in places}
        if len(orders) > 1 or len(places) > 1 or seen.payments[mark] > 1:
            proof.doubled.append(f"unanswered, and there more than once: {mark} {sorted(places)}")
    _versions(proof, seen)
    proof.wrong += [f"order number {one}" for one in seen.numbers_twice]
    proof.wrong += [f"dead: {one}" for one in seen.dead]
    proof.wrong += [f"mirror: {one}" for one in seen.differs]
    return proof


class _Stores:
    """The content of all stores, indexed for the proof."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen
        self.wrote = _by_mark(seen.changes)
        self.logged = _by_mark(seen.logged)
        self.logged_ids = {one.change for one in seen.logged}
        self.logged_payments = {id_: one for one in reversed(seen.logged) for id_ in one.payments}
        """The first change that carries it."""
        self._notes = {
            **{one.notes: f"the mirror, as {one.change}" for one in seen.mirror.values()},
            **{one.notes: f"the log, {one}" for one in seen.logged},
            **{one.notes: f"PostgreSQL, {one}" for one in seen.changes},
        }

    def whereabouts(self, mark: str) -> list[str]:
        found = [self._notes[mark]] if mark in self._notes else []
        if self.seen.payments[mark]:
            found.append("PostgreSQL, a payment")
        if mark in self.logged_payments:
            found.append(f"the log, a payment of {self.logged_payments[mark]}")
        if any(mark in one.payments for one in self.seen.mirror.values()):
            found.append("the mirror, a payment")
        return found


def _by_mark(steps: Iterable[Step]) -> dict[str | None, list[Step]]:
    found: dict[str | None, list[Step]] = defaultdict(list)
    for one in steps:
        if one.wrote_notes:
            found[one.notes].append(one)
    return found


def _change(proof: Proof, stores: _Stores, one: Acknowledged) -> None:
    written = stores.wrote[one.mark]
    mine = [step for step in written if step.order == one.order]
    name = f"{one.what} {one.order} ({one.mark})"
    if not mine:
        logged = stores.logged[one.mark]
        proof.lost.append(f"{name}: not in PostgreSQL; {logged[0] if logged else 'not in the log either'}")
        return
    if len(written) > len(mine) or (one.what == "changed" and len(mine) > 1):
        proof.doubled.append(f"{name}: {len(written)} times")
    # A creation repeated while neither store knew it is a fork of version 1; both sides are in the log.
    proof.lost += [f"{name}: not in the log: {step}" for step in mine if step.change not in stores.logged_ids]
    if one.version and all(step.version != one.version for step in mine):
        proof.wrong.append(f"{name}: answered as version {one.version}, and it is {mine[0]}")
    head = stores.seen.mirror.get(one.order)
    if head is None or head.version < mine[0].version:
        proof.lost.append(f"{name}: not in the mirror, which has {head}")
    elif any(step.change == head.change for step in mine) and head.notes != one.mark:
        proof.lost.append(f"{name}: in the mirror it says {head.notes}")


def _payment(proof: Proof, stores: _Stores, one: Acknowledged) -> None:
    head = stores.seen.mirror.get(one.order)
    counts = {
        "PostgreSQL": stores.seen.payments[one.mark],
        "the mirror": 0 if head is None else head.payments.count(one.mark),
        "the log": int(one.mark in stores.logged_payments),
    }
    for where, count in counts.items():
        if count != 1:
            list_ = proof.doubled if count else proof.lost
            list_.append(f"payment {one.mark} of {one.order}: {count} times in {where}")


def _versions(proof: Proof, seen: Seen) -> None:
    by_version = Counter((one.order, one.version) for one in seen.changes)
    versions: dict[str, set[int]] = defaultdict(set)
    for (order, version), count in by_version.items():
        versions[order].add(version)
        if count > 1:
            proof.forks += 1
            proof.forked_creations += version == 1
            if (order, version) not in seen.conflicts:
                proof.doubled.append(f"version {version} of {order} {count} times, and no open conflict")
    for order, found in versions.items():
        if found != set(range(1, max(found) + 1)):
            proof.wrong.append(f"versions of {order} have a gap: {sorted(found)}")


def pushed_to_strangers(pushed: Mapping[str, Mapping[str, int]], seen: Seen) -> list[str]:
    """Changes pushed to another restaurant. `pushed`: restaurant -> change -> how often it was pushed. The owner of a
    change comes from the stores, not from the event."""
    owners = {one.change: one.restaurant for one in (*seen.logged, *seen.changes)}
    wrong = [
        f"change {change} of restaurant {owners[change]} was pushed to {restaurant}"
        for restaurant, changes in pushed.items()
        for change in changes
        if owners.get(change, restaurant) != restaurant
    ]
    busy = set(owners.values())
    return wrong + [f"nothing was pushed to {one}" for one, changes in pushed.items() if one in busy and not changes]


def journal_of(rig: Rig, instance: int) -> int:
    """Counts the entries in the journal file of a stopped service."""
    with sqlite3.connect(rig.system.directory / "journal" / f"orders-{instance}.sqlite") as db:
        return int(db.execute("select count(*) from entries").fetchone()[0])
