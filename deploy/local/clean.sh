#!/bin/sh
# Removes what `make run` and `make test` made: .local with all its data, .venv, caches. Refuses while the system runs.
set -eu
cd "$(dirname "$0")/../.."
home=${TICKETRAIL_HOME:-.local}
if [ -e "$home/run.lock" ] && ! flock -n "$home/run.lock" true; then
    echo "ticketrail: make run is still running on $home: stop it first" >&2
    exit 1
fi
# PostgreSQL's data lies elsewhere when its user cannot reach this directory.
if [ -L "$home/postgres" ]; then
    case $(readlink "$home/postgres") in /var/lib/ticketrail/*) rm -rf "$(readlink "$home/postgres")" ;; esac
fi
for thing in "$home" .venv .mypy_cache .ruff_cache .import_linter_cache .hypothesis .pytest_cache; do
    if [ -e "$thing" ]; then
        echo "ticketrail: removing $thing"
        rm -rf "$thing"
    fi
done
