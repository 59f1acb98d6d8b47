"""How events reach clients, a file each. To add one: its file, and its line here."""

from services.notifier.transports import sse
from shared.http.openapi import Api

TRANSPORTS = [sse.events]
API = Api("Ticketrail: notifier", "What terminals and browsers listen to.", TRANSPORTS)
