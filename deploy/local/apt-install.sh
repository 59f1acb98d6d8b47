#!/bin/sh
# Installs Debian or Ubuntu packages without letting any of them start a server of its own, now or at the next boot.
#
#   apt-install.sh PACKAGE...
#
# It needs root, or a sudo that asks for no password. Otherwise it prints the packages and the command, and exits with 1.
# It restores the machine's own policy-rc.d in any case. If it is killed, its next run restores the file.
set -eu

if ! command -v apt-get >/dev/null 2>&1; then
    echo "ticketrail: missing: $* (this machine has no apt-get; install them by other means)" >&2
    exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
    if command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
        exec sudo -n sh "$0" "$@"
    fi
    echo "ticketrail: missing packages: $*" >&2
    echo "ticketrail: as root, run: apt-get update && apt-get install -y --no-install-recommends $*" >&2
    exit 1
fi

policy=/usr/sbin/policy-rc.d
saved=$policy.before-ticketrail
absent=$policy.absent-before-ticketrail
cluster=/etc/postgresql-common/createcluster.d/90-ticketrail.conf

restore() {
    rm -f "$cluster"
    if [ -e "$saved" ] || [ -L "$saved" ]; then mv -f "$saved" "$policy"; fi
    if [ -e "$absent" ]; then rm -f "$policy" "$absent"; fi
}
restore # undoes what a killed run left behind
trap restore EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# The original policy-rc.d is moved aside first (or its absence is marked), so that a kill at any point does not lose it.
if [ -e "$policy" ] || [ -L "$policy" ]; then mv "$policy" "$saved"; else : >"$absent"; fi
printf '#!/bin/sh\nexit 101\n' >"$policy"
chmod 755 "$policy"
mkdir -p "${cluster%/*}"
echo 'create_main_cluster = false' >"$cluster"

units=
for package in "$@"; do
    case $package in
    # Erlang, which comes with RabbitMQ, brings its own units.
    rabbitmq-server) units="$units rabbitmq-server $(command -v epmd >/dev/null 2>&1 || echo epmd.service epmd.socket)" ;;
    redis-server) units="$units redis-server valkey-server" ;;
    postgresql) units="$units postgresql" ;;
    nginx-light) units="$units nginx" ;;
    esac
done

echo "ticketrail: installing $*"
export DEBIAN_FRONTEND=noninteractive
# If this fails, the existing package lists may be good enough.
apt-get update -qq -o DPkg::Lock::Timeout=120 || echo "ticketrail: apt-get update failed; the existing package lists are used" >&2
names=
for package in "$@"; do
    # Some releases have Redis, others have Valkey. Either one is fine.
    if [ "$package" = redis-server ] && ! apt-cache show redis-server >/dev/null 2>&1; then package=valkey-server; fi
    names="$names $package"
done
output=$(mktemp)
# shellcheck disable=SC2086  # a list of package names
if ! apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=120 $names >"$output" 2>&1; then
    tail -n 30 "$output" >&2
    rm -f "$output"
    exit 1
fi
rm -f "$output"

# policy-rc.d only acts during the installation. Enabled units would start at the next boot.
if command -v systemctl >/dev/null 2>&1; then
    for unit in $units; do systemctl disable -q "$unit" 2>/dev/null || true; done
fi
