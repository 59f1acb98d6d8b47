#!/bin/sh
# sh deploy/secrets.sh [FILE]: adds a strong value to FILE (default: .env) for each secret that deploy/compose.env.example
# names and FILE does not set. It keeps values that are set, because the databases keep the passwords of their first start.
set -eu

here=$(cd "$(dirname "$0")" && pwd -P)
file=${1:-$here/../.env}
umask 077

secret() { head -c 32 /dev/urandom | base64 | tr '+/' '-_' | tr -d '=\n'; }

touch "$file"
chmod 600 "$file"
created=0
for name in $(sed -n 's/^\(TICKETRAIL_[A-Z_]*\)=$/\1/p' "$here/compose.env.example"); do
    grep -q "^$name=." "$file" && continue
    # An empty line for the same name, further down, would override ours.
    sed -i "/^$name=\$/d" "$file"
    echo "$name=$(secret)" >>"$file"
    created=$((created + 1))
done
echo "$created secrets created in $file"
