"""The push transports, one file each. To add one, add its file and its line here."""

from services.notifier.transports import sse
from shared.http.openapi import Api

TRANSPORTS = [sse.events]
API = Api("Ticketrail: notifier", "The event stream for terminals and browsers.", TRANSPORTS)
