#!/bin/sh
# Installs the client generators that the tests run on the OpenAPI document of the server API: one for Python (PyPI:
# openapi-python-client) and one for TypeScript (npm: openapi-typescript, with openapi-fetch and the compiler), each
# into a folder of its own if it is missing. Needs python3 3.10 or later with venv, and Node 20 or later with npm
# (packages python3-venv, nodejs and npm of Debian).
set -eu

cache=${XDG_CACHE_HOME:-$HOME/.cache}/skein
setup=$(dirname "$0")/setup.sh

version=0.29.1
folder=$cache/openapi-python-client-$version
if [ ! -e "$folder/done" ]; then
    python3 -c 'import venv, ensurepip' 2> /dev/null || "$setup" python3-venv
    echo "openapi-clients.sh: installing openapi-python-client $version into $folder"
    rm -rf "$folder"
    python3 -m venv "$folder"
    "$folder/bin/pip" install --quiet --disable-pip-version-check "openapi-python-client==$version"
    touch "$folder/done"
fi

version=7.13.0
folder=$cache/openapi-typescript-$version
if [ ! -e "$folder/done" ]; then
    command -v npm > /dev/null || "$setup" nodejs npm
    echo "openapi-clients.sh: installing openapi-typescript $version into $folder"
    rm -rf "$folder"
    mkdir -p "$folder"
    npm install --prefix "$folder" --silent --no-audit --no-fund --no-package-lock \
        "openapi-typescript@$version" openapi-fetch@0.17.0 typescript@5.9.3
    touch "$folder/done"
fi
