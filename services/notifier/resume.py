"""Finds the events after a cursor, or the reason why the client must load its data again."""

from services.notifier.cursor import UNREADABLE, Cursor
from services.notifier.events import PushEvent
from services.notifier.window import Window


def missed_events(window: Window, tenant: str, cursor: Cursor, *, limit: int) -> list[PushEvent] | str:
    """Returns at most `limit` of the tenant's events after the cursor, oldest first, or the reason for a resync:
    `unreadable` (it is not a cursor), `too_old` (the window does not hold every event after it) or `truncated` (the log
    does not have the message of the cursor: it has lost its end, or was created again)."""
    if cursor == UNREADABLE:
        return "unreadable"
    if window.holds_all_after(cursor):
        return window.after(tenant, cursor, limit) if window.proves(cursor) else "truncated"
    return "too_old"
