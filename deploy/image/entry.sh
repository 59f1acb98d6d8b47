#!/bin/sh
# Runs the program that the command of the container names: orders, sync-worker, sync-api, notifier, migrate or `ticketrail …`.
# The image also links this script as `ticketrail`, for `docker compose exec`.
set -eu

[ "${0##*/}" = ticketrail ] && set -- ticketrail "$@"

command=${1:-}
[ "$#" -eq 0 ] || shift
case $command in
orders) exec python -m services.orders ;;
sync-worker) exec python -m services.sync worker ;;
sync-api) exec python -m services.sync api ;;
notifier) exec python -m services.notifier ;;
migrate) exec python -m services.sync.cli migrate ;;
ticketrail) exec python -m services.sync.cli "$@" ;;
*)
    echo "unknown command '$command'; usage: orders | sync-worker | sync-api | notifier | migrate | ticketrail …" >&2
    exit 64
    ;;
esac
