"""The push transports, each in its own file. To add a transport, add its file and a line to TRANSPORTS."""

from services.notifier.transports import sse
from shared.http.openapi import Api

TRANSPORTS = [sse.events]
API = Api("Ticketrail: notifier", "The event stream for terminals and browsers.", TRANSPORTS)
