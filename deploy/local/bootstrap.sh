#!/bin/sh
# Creates .venv from requirements.lock. If .venv is up to date, this script only makes a few quick checks.
# If an earlier run was killed before pip finished, this run creates .venv again.
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd -P)
cd "$root"
venv=$root/.venv
stamp=$venv/.ticketrail-lock
unfinished=$venv/.ticketrail-unfinished
# The stamp includes the root, because a virtual environment that was moved still points to its old path.
expected_stamp="$(sha256sum <requirements.lock | cut -c1-64) $root"

say() { echo "ticketrail: $*"; }

up_to_date() {
    [ -f "$stamp" ] && [ ! -e "$unfinished" ] && [ "$(cat "$stamp")" = "$expected_stamp" ] &&
        [ -x "$venv/bin/ticketrail" ] && "$venv/bin/python" -S -c '' 2>/dev/null
}

# find_usable CODE: prints the path of the first Python from 3.11 on that can run CODE. `python3` comes last, because it may be
# older than another installed Python.
find_usable() {
    for name in python3.14 python3.13 python3.12 python3.11 python3; do
        if "$name" -c "import sys; assert sys.version_info >= (3, 11); $1" >/dev/null 2>&1; then
            command -v "$name"
            return
        fi
    done
    return 1
}

find_python() {
    python=$(find_usable 'import ensurepip, venv') && return
    # venv needs ensurepip, which Debian puts into a separate package.
    if python=$(find_usable ''); then
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        if [ "$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$version" ]; then
            sh deploy/local/apt-install.sh python3-venv
        else
            sh deploy/local/apt-install.sh "python$version-venv"
        fi
    else
        sh deploy/local/apt-install.sh python3 python3-venv
    fi
    python=$(find_usable 'import ensurepip, venv') && return
    echo "ticketrail: needs Python 3.11 or newer with venv" >&2
    exit 1
}

up_to_date && exit 0

# If `make run` and `make test` start at the same moment, one installs. The other waits and then finds .venv up to date.
exec 9<"$root"
flock 9
up_to_date && exit 0

created_for=$(cut -d' ' -f2- "$stamp" 2>/dev/null || echo "$root")
if [ -e "$unfinished" ] || [ "$created_for" != "$root" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    find_python
    say "creating .venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
fi

say "installing the packages of requirements.lock"
: >"$unfinished"
"$venv/bin/python" -m pip install -qq --disable-pip-version-check --require-hashes -r requirements.lock

for site in "$venv"/lib/python3.*/site-packages; do echo "$root" >"$site/ticketrail.pth"; done
cat >"$venv/bin/ticketrail" <<SCRIPT
#!/bin/sh
exec "$venv/bin/python" -m services.sync.cli "\$@"
SCRIPT
chmod 755 "$venv/bin/ticketrail"
echo "$expected_stamp" >"$stamp"
rm -f "$unfinished"
say ".venv is ready"
