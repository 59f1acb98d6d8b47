#!/bin/sh
# The command of a container picks what it runs: orders, sync-worker, sync-api, notifier, migrate, or `ticketrail …`.
# Also linked as `ticketrail`, for `docker compose exec`.
set -eu

[ "${0##*/}" = ticketrail ] && set -- ticketrail "$@"

what=${1:-}
[ "$#" -eq 0 ] || shift
case $what in
orders) exec python -m services.orders ;;
sync-worker) exec python -m services.sync worker ;;
sync-api) exec python -m services.sync api ;;
notifier) exec python -m services.notifier ;;
migrate) exec python -m services.sync.cli migrate ;;
ticketrail) exec python -m services.sync.cli "$@" ;;
*)
    echo "usage: orders | sync-worker | sync-api | notifier | migrate | ticketrail …; not '$what'" >&2
    exit 64
    ;;
esac
