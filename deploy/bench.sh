#!/bin/sh
# Starts a gateway and measures with loadtest what idle connections cost it. `make bench` calls it.
#
#   CONNECTIONS=5000     how many
set -eu
cd "$(dirname "$0")/.."

scratch=$(mktemp -d "${TMPDIR:-/tmp}/skein-bench.XXXXXX")
target/release/gateway --set log.format=json --set server.listen=127.0.0.1:0 \
    --set admin.listen=127.0.0.1:0 --set limits.connections_per_ip=0 \
    --set limits.handshakes_per_minute_per_ip=0 2> "$scratch/log" &
gateway=$!
trap 'kill "$gateway"; wait "$gateway" || true; rm -rf "$scratch"' EXIT
deadline=$(($(date +%s) + 10))
until listen=$(sed -n 's/.*"listen":"\([^"]*\)".*/\1/p' "$scratch/log") && [ -n "$listen" ]; do
    [ "$(date +%s)" -lt $deadline ] || { cat "$scratch/log" >&2; exit 1; }
done
target/release/loadtest connect --url "ws://$listen/ws" --connections "${CONNECTIONS:-5000}" \
    --rooms 500 --rate 2000/s --hold 5s --pid "$gateway"
