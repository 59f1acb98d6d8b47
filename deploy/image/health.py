#!/opt/ticketrail/venv/bin/python -IS
"""`health.py PORT`: prints the health of the service on this port, and exits with 0 if it is ready, else with 1."""

import http.client
import sys


def main(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=4)
    try:
        connection.request("GET", "/health/ready")
        reply = connection.getresponse()
        print(reply.status, reply.read(2000).decode(errors="replace"))
        return 0 if reply.status == 200 else 1
    except (OSError, http.client.HTTPException) as error:
        print(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
        return 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
