#!/bin/sh
# Replaces the running gateways by freshly built ones, one after the other. `docker compose up` would stop all of them in
# the same moment, and every client would be without a gateway to go to.
#
# Usage: rolling-update.sh [COUNT]; COUNT is how many gateways there are to be at the end, by default as many as now.
#
# It compares what runs with the image that was built, and takes one step at a time towards COUNT gateways of that image:
# so it can be run again after any failure, and then goes on where it was. Run twice it changes nothing. It never stops a
# healthy gateway unless COUNT healthy ones stay.
#
#   SETTLE=3   seconds that a new gateway is given before an old one is stopped: nginx looks for new ones every 2 s
set -eu
cd "$(dirname "$0")/.."

# How many gateways there are to be, for the next run after one that was cut off.
note=deploy/.rolling-update

say() { echo "rolling-update.sh: $1"; }
fail() {
    say "$1" >&2
    exit 1
}

# "<image> <status> <health>" of each gateway, healthy or not, running or not, with its id in front.
gateways() {
    # A failure ends the script: with one missing here, `up --scale` would stop another.
    ids=$(docker compose ps --all --quiet gateway)
    [ -n "$ids" ] || return 0
    # The unquoted list is one word per container.
    # shellcheck disable=SC2086
    docker inspect --format \
        '{{.Id}} {{.Image}} {{.State.Status}} {{with .State.Health}}{{.Status}}{{else}}healthy{{end}}' $ids
}

# Reads the present state into `all`, `running`, `healthy`, `sick` (running, not healthy) and `old` (running with another
# image), each one id per line.
look() {
    table=$(gateways)
    all=$(echo "$table" | awk 'NF { print $1 }')
    running=$(echo "$table" | awk '$3 == "running" { print $1 }')
    healthy=$(echo "$table" | awk '$3 == "running" && $4 == "healthy" { print $1 }')
    sick=$(echo "$table" | awk '$3 == "running" && $4 != "healthy" { print $1 }')
    old=$(echo "$table" | awk -v image="$image" '$3 == "running" && $2 != image { print $1 }')
    sick_old=$(echo "$table" | awk -v image="$image" '$3 == "running" && $2 != image && $4 != "healthy" { print $1 }')
}

lines() { printf '%s' "$1" | grep -c . || true; }
first() { echo "$1" | sed -n 1p; }
is_in() { echo "$2" | grep -qx "$1"; }

# One that does not run serves nobody, and `up --no-recreate` would start it again with the image it has.
remove_stopped() {
    for id in $all; do
        is_in "$id" "$running" && continue
        say "removing $id, which does not run"
        docker rm --force "$id" > /dev/null
        removed=1
    done
    [ -z "${removed:-}" ] || look
    removed=
}

remove() {
    say "stopping $1; its clients go to the others"
    # Docker waits for stop_grace_period.
    docker stop "$1" > /dev/null
    docker rm "$1" > /dev/null
}

# One more, with the new image; --no-recreate leaves the others alone.
add() {
    before=$all
    say "starting one more"
    scale=$(($(lines "$running") + 1))
    if docker compose up -d --wait --no-deps --no-recreate --scale gateway="$scale" gateway; then
        look
        [ "$(echo "$table" | grep -c " $image " || true)" -gt "$1" ] ||
            fail "the gateway that was started has another image than the one that was built"
        sleep "${SETTLE:-3}"
        return
    fi
    look
    for id in $all; do
        is_in "$id" "$before" && continue
        docker logs --tail 20 "$id" >&2 || true
        say "removing $id, which did not become healthy"
        docker rm --force "$id" > /dev/null
    done
    fail "a new gateway did not become healthy, and is removed again; run this once more when that is mended"
}

docker compose build gateway
image=$(docker image inspect --format '{{.Id}}' "$(docker compose config --images gateway | sed -n 1p)")
look
remove_stopped
[ -n "$running" ] || fail 'no gateway is running: docker compose up -d'
wanted=${1:-}
if [ -z "$wanted" ] && [ -s "$note" ]; then
    wanted=$(cat "$note")
    say "going on with an update to $wanted gateways that was cut off"
fi
[ -n "$wanted" ] || wanted=$(lines "$running")
case $wanted in
'' | *[!0-9]* | 0) fail "COUNT is '$wanted', not a number above 0" ;;
esac
echo "$wanted" > "$note"

while :; do
    count=$(lines "$running")
    new=$(echo "$table" | grep -c " $image " || true)
    if [ "$count" -gt "$wanted" ]; then
        # Those that serve nobody first, then those with the old image.
        victim=$(first "${sick:-${old:-$running}}")
        is_healthy=$(is_in "$victim" "$healthy" && echo 1 || echo 0)
        [ $(($(lines "$healthy") - is_healthy)) -ge "$wanted" ] ||
            fail "$(lines "$healthy") of $count gateways are healthy: none is stopped before $wanted others are"
        remove "$victim"
    elif [ -n "$sick_old" ] && [ -n "$healthy" ]; then
        # Compose waits for all to be healthy, and this one may never be. Where none is, it is not the gateways' fault.
        remove "$(first "$sick_old")"
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
