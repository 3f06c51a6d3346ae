#!/bin/sh
# Installs schemathesis (from PyPI), which the tests run against the server API, into a folder of its own if it is
# missing. Needs python3 3.10 or later with venv (package python3-venv of Debian).
set -eu

version=4.32.5
folder=${XDG_CACHE_HOME:-$HOME/.cache}/skein/schemathesis-$version
[ -e "$folder/done" ] && exit 0

python3 -c 'import venv, ensurepip' 2> /dev/null || "$(dirname "$0")/setup.sh" python3-venv
echo "schemathesis.sh: installing schemathesis $version into $folder"
rm -rf "$folder"
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check "schemathesis==$version"
touch "$folder/done"
