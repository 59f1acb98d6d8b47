"""Decides how many unacknowledged messages a consumer of a lane may have.

A prefetch counts messages, but a consumer needs memory for bytes, and every message that it gives back has one delivery
more: after `DELIVERY_LIMIT` deliveries the broker dead-letters it. Therefore:

    start      A consumer begins with one message, and takes the full prefetch after it has settled that one. A process
               that dies repeatedly at its start burns the deliveries of one message and not of a hundred.
    bytes      A consumer above `MAX_HELD_BYTES` gives back the messages that exceed it. For a minute, all consumers of
               the lane take at most a quarter of the prefetch, and no more than fit into that memory, so that they do
               not give back the same messages again.
    repeats    After a message that was delivered many times, consumers take one message at a time for a minute. Only
               the message that breaks its consumer then comes closer to the delivery limit.

The consumers of a lane in one process share these decisions. Pure, except for the clock.
"""

import time
from collections.abc import Callable
from typing import Protocol

MAX_HELD_BYTES = 32 << 20
"""The maximum size of the bodies that a consumer holds, except for a single larger one."""
MANY_HELD_BYTES = MAX_HELD_BYTES // 4
"""A consumer that holds less than this could take the full prefetch."""
MANY_DELIVERIES = 5
FIRST_PREFETCH = 1
_REDUCED_SECONDS = 60.0


class Consumer(Protocol):
    @property
    def prefetch(self) -> int:
        """The prefetch of the current subscription; 0 while the broker delivers nothing."""
        ...

    def reduce(self) -> None:
        """Takes the present prefetch of the lane as soon as possible."""
        ...


class LanePrefetch:
    def __init__(self, full: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._full = full
        self._clock = clock
        self._consumers: list[Consumer] = []
        self._largest = 0
        self._large_until = self._repeated_until = float("-inf")

    def add(self, consumer: Consumer) -> None:
        self._consumers.append(consumer)

    @property
    def present(self) -> int:
        """The number of messages that a consumer may have now, after its start."""
        if self._clock() < self._repeated_until:
            return FIRST_PREFETCH
        if self._clock() < self._large_until:
            return max(1, min(self._full // 4, MAX_HELD_BYTES // self._largest))
        return self._full

    @property
    def settled(self) -> bool:
        """False while a consumer of the lane may still receive more messages than `present`."""
        return all(consumer.prefetch <= self.present for consumer in self._consumers)

    def delivered(self, deliveries: int) -> None:
        """Notes how often a message was delivered."""
        if deliveries >= MANY_DELIVERIES:
            self._repeated_until = self._clock() + _REDUCED_SECONDS

    def first(self, size: int) -> None:
        """Notes the size of the first message of a consumer. The full prefetch must have room for such messages."""
        if size * self._full > MAX_HELD_BYTES:
            self._note_large(size)

    def holds(self, held_bytes: int, largest: int) -> bool:
        """Notes the size of the bodies that a consumer holds, which is above `MANY_HELD_BYTES`, and of the largest one.
        Returns whether they are too large."""
        if held_bytes > MAX_HELD_BYTES:
            self._note_large(largest)
            for consumer in self._consumers:
                consumer.reduce()
            return True
        if self._clock() < self._large_until:
            self._note_large(largest)
        return False

    def _note_large(self, size: int) -> None:
        self._largest = max(size, self._largest if self._clock() < self._large_until else 1)
        self._large_until = self._clock() + _REDUCED_SECONDS
