#!/bin/sh
# sh deploy/secrets.sh [FILE]: adds a strong value to FILE (default: .env) for each secret that deploy/compose.env.example
# names and FILE does not set. It keeps values that are set, because the databases keep the passwords of their first start.
# It also creates the key pair that signs tokens, in the folder .secrets beside FILE, and keeps one that is there. Needs openssl.
set -eu

here=$(cd "$(dirname "$0")" && pwd -P)
file=${1:-$(dirname "$here")/.env}
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

keys=$(dirname "$file")/.secrets
mkdir -p "$keys"
chmod 700 "$keys"
if [ ! -s "$keys/jwt_private_key.pem" ]; then
    openssl genpkey -algorithm ed25519 -out "$keys/jwt_private_key.new"
    openssl pkey -in "$keys/jwt_private_key.new" -pubout -out "$keys/jwt_public_key.pem"
    # The user of the containers reads the files, and only this user can enter the folder.
    chmod 644 "$keys/jwt_private_key.new" "$keys/jwt_public_key.pem"
    mv "$keys/jwt_private_key.new" "$keys/jwt_private_key.pem"
    created=$((created + 1))
fi
echo "$created secrets created in $file and $keys"
