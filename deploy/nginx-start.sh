#!/bin/sh
# Entry point of the nginx container: makes a certificate if there is none, renders the configuration, starts nginx.
set -eu

tls=/etc/nginx/tls
names=${TLS_NAMES:-localhost}

fail() {
    echo "nginx-start.sh: $1" >&2
    exit 1
}

# Makes a self-signed certificate. Browsers warn about it. It is made once; the volume keeps it or its replacement.
make_certificate() {
    alternatives=IP:127.0.0.1
    for name in $names; do
        case $name in
        *[!A-Za-z0-9.*-]*) fail "TLS_NAMES: '$name' is not a host name" ;;
        esac
        alternatives="$alternatives,DNS:$name"
    done
    (
        umask 077
        openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 \
            -subj "/CN=${names%% *}" -addext "subjectAltName=$alternatives" \
            -addext basicConstraints=critical,CA:FALSE \
            -keyout "$tls/new.key" -out "$tls/new.crt" 2> /tmp/openssl.log
    ) || fail "openssl failed to make a certificate: $(cat /tmp/openssl.log)"
    mv "$tls/new.key" "$tls/tls.key"
    mv "$tls/new.crt" "$tls/tls.crt"
    echo "nginx-start.sh: made a self-signed certificate for $names"
}

mkdir -p "$tls"
if [ -e "$tls/tls.crt" ] && [ -e "$tls/tls.key" ]; then
    :
elif [ -e "$tls/tls.crt" ] || [ -e "$tls/tls.key" ]; then
    fail "only one of tls.crt and tls.key is in $tls: add the other, or remove it to get a self-signed pair"
else
    make_certificate
fi

set -- sticky --cert "$tls/tls.crt" --key "$tls/tls.key" --https-port "${HTTPS_PORT:-443}" \
    --connections-per-ip "${NGINX_CONNECTIONS_PER_IP:-200}" \
    --handshakes-per-second-per-ip "${NGINX_HANDSHAKES_PER_SECOND_PER_IP:-20}"
for cidr in ${NGINX_REAL_IP_FROM:-}; do
    set -- "$@" --real-ip-from "$cidr"
done
/opt/skein/nginx/render.sh "$@" > /etc/nginx/nginx.conf

exec nginx
