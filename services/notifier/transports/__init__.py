"""How events reach clients, a file each. To add one: its file, and its line here."""

from services.notifier.transports import sse

TRANSPORTS = [sse.events]
