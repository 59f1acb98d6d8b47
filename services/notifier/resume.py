"""Finds the events after a cursor, or the reason why the client must load its data again."""

from services.notifier.cursor import Cursor
from services.notifier.events import PushEvent
from services.notifier.window import Window


def missed_events(window: Window, tenant: str, cursor: Cursor, *, limit: int) -> list[PushEvent] | str:
    """Returns at most `limit` of the tenant's events after the cursor, oldest first, or the reason for a resync:
    `other_epoch` (the cursor is of another change log, or ahead of this one) or `too_old` (the window does not hold
    every event after it)."""
    if cursor.epoch != window.epoch or cursor.position > window.present:
        return "other_epoch"
    if not window.holds_all_after(cursor.position):
        return "too_old"
    return window.after(tenant, cursor.position, limit)
