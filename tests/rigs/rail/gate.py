"""Holds every call of a rail to its broker, journal and mirror as a `Step`, until the test chooses the outcome.

So a crash or a stall can come before and after every step, and any two steps can be interleaved."""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from shared.errors import Unavailable
from shared.messaging.publisher import InDoubt, NotSent
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.rail.journal import JournalBroken
from tests.rigs.rail.clock import Clock

# The possible outcomes of each call; the first is success. A `late` call happens when the test chooses, or never.
# `earlier` is the search for an earlier creation.
OUTCOMES = {
    "claim": ("done", "done", "done", "done", "done, unheard", "done, unheard", "never", "late", "unavailable"),
    "apply": ("done", "done", "done", "done", "done, unheard", "never", "late", "unavailable"),
    "take_back": ("done", "done", "done", "done, unheard", "never", "late", "unavailable"),
    "publish": ("done", "done", "done", "not sent", "not sent", "done, unheard", "late", "never"),
    "append": ("done", "done", "done", "broken", "broken"),
    "reserve_numbers": ("done", "done", "done", "broken"),
    "remove": ("done", "done", "broken"),
    "earlier": ("done", "done", "done", "no answer"),
}
_ERRORS: dict[str, type[Exception]] = {
    "broken": JournalBroken,
    "no answer": Unavailable,
    "not sent": NotSent,
    "unavailable": MirrorUnavailable,
}
_ANSWER_TIMEOUT_SECONDS = 0.6
"""The time that a missing answer takes. Two missing answers reach the timeouts of the rail."""


@dataclass
class Step:
    """One held call; `do` makes it."""

    kind: str
    owner: Any
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    note: Callable[["Step", Any], None]
    reply: "asyncio.Future[Any]"

    async def do(self) -> Any:
        result = await self.call(*self.arguments)
        self.note(self, result)
        return result


class Gate:
    """`seen` counts the outcomes. `note` is called with every step that was done, and its result."""

    def __init__(self, clock: Clock, seen: Counter[str], note: Callable[[Step, Any], None]) -> None:
        self._clock, self._seen, self._note = clock, seen, note
        self.steps: list[Step] = []
        self.late: list[Step] = []
        """Steps whose caller has given up."""
        self._dead: set[Any] = set()

    def before(self, part: Any, owner: Any) -> Any:
        """Returns `part` with its calls held for `owner`. Calls that OUTCOMES does not name pass through."""
        return _Gated(self, part, owner)

    async def ask(
        self,
        owner: Any,
        kind: str,
        call: Callable[..., Any],
        *arguments: Any,
        within: float | None = None,
        **named: Any,
    ) -> Any:
        """`within` is not passed on, because the server has another clock than the test."""
        if owner in self._dead:
            raise asyncio.CancelledError
        step = Step(
            kind, owner, partial(call, **named), arguments, self._note, asyncio.get_running_loop().create_future()
        )
        self.steps.append(step)
        return await step.reply

    def of(self, owner: Any) -> list[Step]:
        return [step for step in self.steps if step.owner is owner]

    async def happen(self, step: Step, outcome: str = "done") -> None:
        self.steps.remove(step)
        self._seen[f"{step.kind}: {outcome}"] += 1
        if outcome in ("done", "done, unheard"):
            result = await step.do()
            if outcome == "done":
                step.reply.set_result(result)
                return
        elif outcome == "late":
            self.late.append(step)
        self._clock.move(seconds=_ANSWER_TIMEOUT_SECONDS)
        no_answer = InDoubt if step.kind == "publish" else MirrorInDoubt
        step.reply.set_exception(_ERRORS.get(outcome, no_answer)("the test chose it"))

    def crash(self, owner: Any) -> None:
        """Acts like kill -9: the owner's open steps never happen, and the owner takes no further steps."""
        self._dead.add(owner)
        self.steps = [step for step in self.steps if step.owner is not owner]


class _Gated:
    def __init__(self, gate: Gate, part: Any, owner: Any) -> None:
        self._gate, self._part, self._owner = gate, part, owner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._part, name)
        return partial(self._gate.ask, self._owner, name, found) if name in OUTCOMES else found
