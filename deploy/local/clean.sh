#!/bin/sh
# `make clean`: removes the data of `make run`, then .local, .venv and the caches. Refuses while a system of this
# checkout runs.
#
# It runs `make reset` for the data, because `make reset` finds the home as `make run` does: by TICKETRAIL_HOME in the environment or
# in .env. In a home outside .local, `make reset` removes only what `make run` created.
set -eu
cd "$(dirname "$0")/../.."
if [ -e .local/run.lock ] && ! flock -n .local/run.lock true; then
    echo "ticketrail: make run is still running on .local; stop it first" >&2
    exit 1
fi
if .venv/bin/python -c 'import deploy.local.reset' 2>/dev/null; then
    .venv/bin/python -m deploy.local.reset --before-clean
elif [ -n "${TICKETRAIL_HOME+set}" ] || grep -q '^[^#]*TICKETRAIL_HOME=' .env 2>/dev/null; then
    echo "ticketrail: .venv does not work, so the data in TICKETRAIL_HOME stays; \`make reset\` removes it" >&2
fi
# If the user of PostgreSQL cannot reach this directory, its data is elsewhere, and .local/postgres is a link to it.
if [ -L .local/postgres ]; then
    case $(readlink .local/postgres) in /var/lib/ticketrail/*) rm -rf "$(readlink .local/postgres)" ;; esac
fi
for name in .local .venv .mypy_cache .ruff_cache .import_linter_cache .hypothesis .pytest_cache; do
    if [ -e "$name" ]; then
        echo "ticketrail: removing $name"
        rm -rf "$name"
    fi
done
