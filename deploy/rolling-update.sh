#!/bin/sh
# Replaces the running gateways by freshly built ones, one after the other. `docker compose up` would stop all of them in
# the same moment, and every client would be without a gateway to go to.
set -eu
cd "$(dirname "$0")/.."

docker compose build gateway
old=$(docker compose ps -q gateway)
[ -n "$old" ] || { echo 'rolling-update.sh: no gateway is running: docker compose up -d' >&2; exit 1; }
count=$(echo "$old" | wc -l)

for container in $old; do
    # One more, with the new image; --no-recreate leaves the old ones alone.
    docker compose up -d --wait --no-deps --no-recreate --scale gateway=$((count + 1)) gateway
    # Sends its clients elsewhere before it ends; Docker waits for stop_grace_period.
    docker stop "$container"
    docker rm "$container"
done
