#!/bin/sh
# Installs the Debian packages that the tests start, if they are missing, and says which.
#
# Usage: setup.sh [package...]; without arguments all of them. Needs root or sudo only where
# something is missing.
set -eu

[ $# -gt 0 ] || set -- gcc libc6-dev redis-server nginx chromium chromium-driver openssl

missing=
for package in "$@"; do
    case $(dpkg-query -W -f '${db:Status-Status}' "$package" 2> /dev/null) in
    installed) ;;
    *)
        # Any nginx does, Debian has several.
        [ "$package" = nginx ] && [ -x /usr/sbin/nginx ] && continue
        missing="$missing $package"
        ;;
    esac
done
[ -n "$missing" ] || exit 0

command -v apt-get > /dev/null || {
    echo "setup.sh: needs$missing, and there is no apt-get to install them: install them by hand" >&2
    exit 1
}
as_root=
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo > /dev/null || {
        echo "setup.sh: needs$missing: run 'apt-get install$missing' as root" >&2
        exit 1
    }
    as_root=sudo
fi

echo "setup.sh: installing$missing"
# A package must not start a server of its own: the tests start theirs on free ports.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' | $as_root tee $policy > /dev/null
    $as_root chmod +x $policy
    trap '$as_root rm -f $policy' EXIT
fi
$as_root apt-get update -qq
# The unquoted list is one word per package.
# shellcheck disable=SC2086
$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing > /dev/null
echo "setup.sh: installed$missing"
