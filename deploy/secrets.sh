#!/bin/sh
# sh deploy/secrets.sh [FILE]: writes FILE (.env) with a strong secret for each one that deploy/compose.env.example names
# and that FILE does not set yet. What is set stays: other passwords than those of the first start open no database.
set -eu

here=$(cd "$(dirname "$0")" && pwd -P)
file=${1:-$here/../.env}
umask 077

secret() { head -c 32 /dev/urandom | base64 | tr '+/' '-_' | tr -d '=\n'; }

touch "$file"
chmod 600 "$file"
made=0
for name in $(sed -n 's/^\(TICKETRAIL_[A-Z_]*\)=$/\1/p' "$here/compose.env.example"); do
    grep -q "^$name=." "$file" && continue
    # A line without a value would win over ours when it stood below.
    sed -i "/^$name=\$/d" "$file"
    echo "$name=$(secret)" >>"$file"
    made=$((made + 1))
done
echo "$made secrets made in $file"
