#!/bin/sh
# Replaces the running gateways by newly built ones, one after the other. `docker compose up` would stop all of them at
# the same time, and clients would find no gateway to reconnect to.
#
# Usage: rolling-update.sh [COUNT]; COUNT is the number of gateways at the end, by default the present number.
#
# It checks the configuration with the built image first, and changes nothing if that is invalid. Then it compares the
# running gateways with the image, and takes one step at a time towards COUNT gateways of that image: a new gateway
# starts before an old one stops, so that the clients of the old one go to it and move only once (ADR 22). A gateway
# that does not become healthy is removed, also if this script is interrupted meanwhile. After any failure it can be run
# again, and continues where it stopped. A second run changes nothing. It stops a healthy gateway only if COUNT healthy
# ones remain.
#
#   SETTLE=3   seconds between the start of a new gateway and the stop of an old one: nginx discovers gateways every 2 s
set -eu
cd "$(dirname "$0")/.."

# File with the wanted number of gateways, for the next run after an interrupted one.
note=deploy/.rolling-update

say() { echo "rolling-update.sh: $1"; }
fail() {
    say "$1" >&2
    exit 1
}

# Prints "<id> <image> <status> <health>" of each gateway, running or not.
gateways() {
    # A failure ends the script: if a gateway were missing here, `up --scale` would stop another one.
    ids=$(docker compose ps --all --quiet gateway)
    [ -n "$ids" ] || return 0
    # The unquoted list is one word per container.
    # shellcheck disable=SC2086
    docker inspect --format \
        '{{.Id}} {{.Image}} {{.State.Status}} {{with .State.Health}}{{.Status}}{{else}}healthy{{end}}' $ids
}

# Reads the present state into `all`, `running`, `healthy`, `unhealthy` (running, not healthy) and `old` (running with
# another image), each with one id per line.
look() {
    table=$(gateways)
    all=$(echo "$table" | awk 'NF { print $1 }')
    running=$(echo "$table" | awk '$3 == "running" { print $1 }')
    healthy=$(echo "$table" | awk '$3 == "running" && $4 == "healthy" { print $1 }')
    unhealthy=$(echo "$table" | awk '$3 == "running" && $4 != "healthy" { print $1 }')
    old=$(echo "$table" | awk -v image="$image" '$3 == "running" && $2 != image { print $1 }')
    unhealthy_old=$(echo "$table" | awk -v image="$image" '$3 == "running" && $2 != image && $4 != "healthy" { print $1 }')
}

lines() { printf '%s' "$1" | grep -c . || true; }
first() { echo "$1" | sed -n 1p; }
is_in() { echo "$2" | grep -qx "$1"; }

# A stopped gateway serves no clients, and `up --no-recreate` would start it again with its old image.
remove_stopped() {
    for id in $all; do
        is_in "$id" "$running" && continue
        say "removing $id, which is not running"
        docker rm --force "$id" > /dev/null
        removed=1
    done
    [ -z "${removed:-}" ] || look
    removed=
}

remove() {
    say "stopping $1; its clients reconnect to the others"
    # Docker waits for stop_grace_period.
    docker stop "$1" > /dev/null
    docker rm "$1" > /dev/null
}

# Removes the gateways that were started since `before` was read.
remove_started() {
    look
    for id in $all; do
        is_in "$id" "$before" && continue
        docker logs --tail 20 "$id" >&2 || true
        say "removing $id, which did not become healthy"
        docker rm --force "$id" > /dev/null
    done
}

# Ends the script after a signal, without a gateway that is half started.
interrupted() {
    trap '' INT TERM
    [ -z "${starting:-}" ] || remove_started
    fail 'interrupted; run this script again to continue'
}

# Starts one more gateway with the new image; --no-recreate leaves the others unchanged.
add() {
    before=$all
    starting=1
    say "starting one more gateway"
    scale=$(($(lines "$running") + 1))
    if docker compose up -d --wait --no-deps --no-recreate --scale gateway="$scale" gateway; then
        starting=
        look
        [ "$(echo "$table" | grep -c " $image " || true)" -gt "$1" ] ||
            fail "the started gateway has another image than the built one"
        sleep "${SETTLE:-3}"
        return
    fi
    remove_started
    starting=
    fail "a new gateway did not become healthy and was removed; fix the cause (log above) and run this script again"
}

trap interrupted INT TERM
docker compose build gateway
# 64: the configuration is invalid. The output says where.
if docker compose run --rm --no-deps -T gateway check-config >&2; then
    say 'the configuration is valid'
else
    fail 'the new gateway rejects its configuration (above); nothing was changed'
fi
# Not `config --images gateway`, which lists the images of dependencies too, in any order.
image=$(docker compose config | awk '/^  [^ ]/ { name = $1 } name == "gateway:" && $1 == "image:" { print $2 }')
image=$(docker image inspect --format '{{.Id}}' "$image")
look
remove_stopped
[ -n "$running" ] || fail 'no gateway is running: docker compose up -d'
wanted=${1:-}
if [ -z "$wanted" ] && [ -s "$note" ]; then
    wanted=$(cat "$note")
    say "continuing an interrupted update to $wanted gateways"
fi
[ -n "$wanted" ] || wanted=$(lines "$running")
case $wanted in
'' | *[!0-9]* | 0) fail "COUNT is '$wanted'; it must be a number above 0" ;;
esac
echo "$wanted" > "$note"

while :; do
    count=$(lines "$running")
    new=$(echo "$table" | grep -c " $image " || true)
    if [ "$count" -gt "$wanted" ]; then
        # Unhealthy gateways first, then those with the old image.
        victim=$(first "${unhealthy:-${old:-$running}}")
        is_healthy=$(is_in "$victim" "$healthy" && echo 1 || echo 0)
        [ $(($(lines "$healthy") - is_healthy)) -ge "$wanted" ] ||
            fail "$(lines "$healthy") of $count gateways are healthy: a gateway is stopped only if $wanted healthy ones remain"
        remove "$victim"
    elif [ -n "$unhealthy_old" ] && [ -n "$healthy" ]; then
        # Compose waits for all to be healthy, and this one may never be. If none is healthy, the cause is not the
        # gateway.
        remove "$(first "$unhealthy_old")"
    elif [ "$count" -lt "$wanted" ] || [ -n "$old" ]; then
        add "$new"
    else
        break
    fi
    look
    remove_stopped
done
rm -f "$note"
say "$wanted gateways run the image $image"
