#!/bin/sh
# Installs the Debian packages whose programs the tests start, if they are missing, and prints their names.
#
# Usage: setup.sh [package...]; without arguments all packages. Needs root or sudo only if a package is missing.
set -eu

[ $# -gt 0 ] || set -- gcc libc6-dev redis-server nginx chromium chromium-driver openssl python3 valkey-server iproute2 git \
    prometheus prometheus-blackbox-exporter faketime haproxy caddy postgresql

missing=
backports=
for package in "$@"; do
    case $(dpkg-query -W -f '${db:Status-Status}' "$package" 2> /dev/null) in
    installed) ;;
    *)
        # Any nginx works; Debian has several packages.
        [ "$package" = nginx ] && [ -x /usr/sbin/nginx ] && continue
        # Any Python that is new enough works.
        [ "$package" = python3 ] && python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null && continue
        # Debian 12 has it in its backports. On other systems without it, the tests report that.
        if [ "$package" = valkey-server ]; then
            codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
            [ "$codename" = bookworm ] && backports=$package
            apt-cache show $package > /dev/null 2>&1 || continue
            backports=
        fi
        missing="$missing $package"
        ;;
    esac
done
[ -n "$missing$backports" ] || exit 0

command -v apt-get > /dev/null || {
    echo "setup.sh: missing packages:$missing; there is no apt-get, so install them by hand" >&2
    exit 1
}
as_root=
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo > /dev/null || {
        [ -n "$missing" ] || exit 0
        echo "setup.sh: missing packages: run 'apt-get install$missing' as root" >&2
        exit 1
    }
    as_root=sudo
fi

echo "setup.sh: installing$missing${backports:+ $backports}"
# A package must not start its server: the tests start their own servers on free ports.
policy=/usr/sbin/policy-rc.d
lists=$(mktemp -d)
trap 'rm -rf "$lists"' EXIT
if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' | $as_root tee $policy > /dev/null
    $as_root chmod +x $policy
    trap '$as_root rm -rf $policy "$lists"' EXIT
fi
install() {
    # The unquoted list is one word per package.
    # shellcheck disable=SC2086
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get $from update -qq &&
        $as_root env DEBIAN_FRONTEND=noninteractive apt-get $from install -y -qq --no-install-recommends "$@" > /dev/null
}
from=
# shellcheck disable=SC2086
[ -z "$missing" ] || install $missing
if [ -n "$backports" ]; then
    # From a separate source list, so that the list of the system does not change. The dependencies of the package came
    # with redis-server.
    mkdir -p "$lists/state" && chmod -R 755 "$lists"
    key=/usr/share/keyrings/debian-archive-keyring.gpg
    echo "deb [signed-by=$key] http://deb.debian.org/debian bookworm-backports main" > "$lists/backports.list"
    from="-o Dir::Etc::sourcelist=$lists/backports.list -o Dir::Etc::sourceparts=/dev/null -o Dir::State::lists=$lists/state"
    install "$backports" || echo "setup.sh: cannot install $backports: the tests run without it"
fi
echo "setup.sh: done"
