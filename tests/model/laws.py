"""Promises 1 to 5 of the design as laws about a world.

law 1  a commit that returned is in the broker's lanes or in a journal
law 2  a reader of the mirror then sees its change, unless the commit said `visible: false` or the mirror was lost
law 3  no reader ever sees a commit that raised ClaimLost or Unavailable, also not after all claims are finished
law 4  in one life of a mirror a version is recorded by one change; a fork needs a lost mirror (or a creation made
       without one) whose change was not in the lanes when the next mirror became warm. No number is given twice
law 5  whatever the order and repetition, PostgreSQL and the mirror end with the same states, made of exactly the
       recorded changes; one change id has one content

A life of a mirror ends when the mirror is lost.
"""

from itertools import groupby, permutations

from shared.entities.contract import Change, encode
from shared.entities.order import ENTITY as ORDER
from shared.errors import OutcomeUnknown, Unavailable
from shared.rail.draft import change_of
from shared.rail.outcomes import ClaimLost, Committed
from tests.model.world import Attempt, World
from tests.rigs.rail.changes import changes_in

ENTITIES = [f"{n}0000000-0000-4000-8000-000000000000" for n in (1, 2, 3, 4)]


def check_always(world: World) -> None:
    """Laws 1 to 3, which hold after every step."""
    hear(world)
    if not world.attempts:
        return
    sent = world.broker.recorded().keys() | world.run(world.journaled())
    documents = world.run(world.instances[0].read_all(ENTITIES))
    for attempt in world.attempts:
        if done := attempt.committed:
            assert done.head.change_id in sent, (
                f"law 1: {attempt.tag} was acknowledged and is neither in the lanes nor in a journal"
            )
        if found := attempt.standing:
            assert found.head.change_id in sent, (
                f"law 1: {attempt.tag} was answered with a state that is neither in the lanes nor in a journal"
            )
    for id_, head in world.shown.items():
        assert id_ in documents, f"law 2: {id_} was acknowledged as visible and is not there"
        assert documents[id_][0] >= head, f"law 2: {id_} was shown at {head} and is at {documents[id_][0]}"
    absent = _absent(world)
    for _, order in documents.values():
        assert order.notes not in absent, f"law 3: {order.notes} was refused and a reader sees it"


def hear(world: World) -> None:
    """Checks and counts the results of commits that have ended since the last call."""
    for attempt in world.attempts:
        if attempt.heard or not attempt.ended:
            continue
        attempt.heard = True
        if found := attempt.standing:
            world.seen["commit: replayed" if found.state.notes == attempt.tag else "commit: exists"] += 1
            continue
        if (done := attempt.committed) is None:
            error = attempt.error
            assert isinstance(error, (ClaimLost, Unavailable, OutcomeUnknown)), f"{attempt.tag} raised {error!r}"
            world.seen[f"commit: {type(error).__name__}"] += 1
            continue
        world.seen[f"commit: {_outcome(done)}"] += 1
        if done.visible:
            world.shown[done.state.id] = max(done.head, world.shown.get(done.state.id, done.head))


def check_at_the_end(world: World) -> None:
    """Laws 3 to 5, after everything has been finished and delivered."""
    recorded = world.broker.recorded()
    absent = _absent(world)
    for change in recorded.values():
        notes = ORDER.decode(change).notes
        assert notes not in absent, f"law 3: {notes} was refused and is recorded"
    _check_forks(world, list(recorded.values()))
    _check_numbers(list(recorded.values()))
    _check_stores(world, recorded)


def _outcome(done: Committed) -> str:
    return f"{done.durability}, {'visible' if done.visible else 'not visible'}"


def _absent(world: World) -> set[str]:
    """Tags of changes that no reader may ever see, because every attempt at them was refused."""
    refused = {one.tag for one in world.attempts if one.refused and not _may_exist(world, one)}
    return refused - {one.tag for one in world.attempts if not one.refused}


def _may_exist(world: World, attempt: Attempt) -> bool:
    """A creation whose id already has a head gets the current state, like a repeat: the order exists. After a claim in
    doubt, the change of this attempt may be older than the head, if another process has finished it."""
    return attempt.standing is not None and change_of(attempt.draft).id in world.doubted


def _check_forks(world: World, recorded: list[Change]) -> None:
    claimed_in = world.claimed_in
    for change in recorded:
        if not claimed_in[change.id]:
            number = ORDER.decode(change).order_number
            unclaimed = change.basechangeid is None and "-" in number
            assert unclaimed, f"law 4: {change.id} was recorded and never claimed"
    for (id_, version), group in groupby(sorted(recorded, key=_version_of), key=_version_of):
        forked = list(group)
        world.seen["fork"] += len(forked) > 1
        for one, other in permutations(forked, 2):
            lives, others = claimed_in[one.id], claimed_in[other.id]
            assert not lives & others, f"law 4: {id_} version {version} was claimed twice in life {lives & others}"
            for life in others:
                known = world.in_lanes_when_warm.get(life, set())
                assert one.id not in known, f"law 4: {id_} version {version} was given again in life {life}"


def _version_of(change: Change) -> tuple[str, int]:
    return change.entity_id, change.entityversion


def _check_numbers(recorded: list[Change]) -> None:
    given: dict[str, Change] = {}
    for change in recorded:
        number = ORDER.decode(change).order_number
        assert number, f"law 4: {change.subject} has no number"
        if change.basechangeid is None:
            other = given.setdefault(number, change)
            assert other.entity_id == change.entity_id, f"law 4: number {number} was given twice"


def _check_stores(world: World, recorded: dict[str, Change]) -> None:
    contents: dict[str, bytes] = {}
    for change in changes_in(*world.broker.lanes):
        after = bytes(change.data.after)
        assert contents.setdefault(change.id, after) == after, f"law 5: {change.id} has two contents"
    for attempt in world.attempts:
        if done := attempt.committed:
            assert contents[done.head.change_id] == encode(done.state), "law 5: the reply had another state"
    lacks = "law 5: PostgreSQL lacks a change or has an extra one"
    assert world.postgres.changes.keys() == recorded.keys(), lacks
    documents = world.run(world.instances[0].read_all(ENTITIES))
    heads = {id_: (change.head, bytes(change.data.after)) for id_, change in world.postgres.heads.items()}
    found = {id_: (head, encode(order)) for id_, (head, order) in documents.items()}
    assert found == heads, "law 5: the mirror and PostgreSQL disagree"
