#!/bin/sh
# Replaces the files of Swagger UI in shared/http/swagger_ui by the files of another version.
#
#   swagger-ui.sh VERSION
#
# npm checks the package against the checksum of the registry. The files are copied unchanged, with their licences. SHA256SUMS
# holds their checksums, and a test compares them.
set -eu
cd "$(dirname "$0")/../.."

version=${1:-}
if [ -z "$version" ]; then
    echo "ticketrail: name the version, such as: make swagger VERSION=5.35.0" >&2
    exit 2
fi
target=$PWD/shared/http/swagger_ui
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cd "$work"
npm pack --silent "swagger-ui-dist@$version" >/dev/null
tar -xzf "swagger-ui-dist-$version.tgz"
cd package
files="LICENSE NOTICE swagger-ui-bundle.js swagger-ui-bundle.js.LICENSE.txt swagger-ui.css favicon-32x32.png"
echo "$version" >VERSION
# shellcheck disable=SC2086
sha256sum $files VERSION >SHA256SUMS
# shellcheck disable=SC2086
install -m 644 $files VERSION SHA256SUMS "$target/"
echo "ticketrail: shared/http/swagger_ui now has version $version; open /api-docs of a service before you commit"
