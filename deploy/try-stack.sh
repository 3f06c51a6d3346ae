#!/usr/bin/env bash
# Tries the compose stack on a machine with a Docker engine, as a project of its own beside a running one: build, three
# gateways, and delivery checks over wss during a killed gateway, scaling, a rolling update and a restart of Redis.
#
# Prints one line per step, ends at the first one that fails (exit code 1) with the logs of the stack, and removes its
# containers, networks and volumes however it ends. Each step has a time limit.
#
#   LOADTEST=target/release/loadtest   the checker: cargo build --release -p loadtest
#   LEAVE_OUT="grafana traces"         services that are not started, such as those whose images cannot be had here
#   GATEWAY_FROM=builder               prebuilt: the image takes dist/gateway (deploy/package.sh) instead of compiling
#   HTTP_PORT=18080 HTTPS_PORT=18443 PROMETHEUS_PORT=19090 GRAFANA_PORT=13000 TRACES_PORT=26686 SUBNET=172.30.252
#   BUILD_MAX=3600                     seconds that a build may take
#   SECONDS_OF_CHECK=20                duration of each delivery check
set -euo pipefail
cd "$(dirname "$0")/.."

loadtest=${LOADTEST:-target/release/loadtest}
leave_out=${LEAVE_OUT-traces}
check_seconds=${SECONDS_OF_CHECK:-20}
build_max=${BUILD_MAX:-3600}
export COMPOSE_PROJECT_NAME=skein-try GATEWAY_IMAGE=skein-try-gateway NGINX_IMAGE=skein-try-nginx
export HTTP_PORT=${HTTP_PORT:-18080} HTTPS_PORT=${HTTPS_PORT:-18443} SUBNET=${SUBNET:-172.30.252}
export PROMETHEUS_PORT=${PROMETHEUS_PORT:-19090} GRAFANA_PORT=${GRAFANA_PORT:-13000} TRACES_PORT=${TRACES_PORT:-26686}
# All clients have one address here, and any name will do.
export NGINX_CONNECTIONS_PER_IP=0 NGINX_HANDSHAKES_PER_SECOND_PER_IP=0
export GATEWAY__AUTH__MODE=anonymous GATEWAY__AUTH__ALLOW_ANONYMOUS=true
unset COMPOSE_FILE COMPOSE_PROFILES

scratch=$(mktemp -d "${TMPDIR:-/tmp}/skein-try.XXXXXX")
note=deploy/.rolling-update
[ ! -e "$note" ] || { echo "try-stack.sh: $note exists: finish the rolling update first" >&2; exit 1; }
cat > "$scratch/limits.yml" <<'LIMITS'
services:
  gateway:
    environment:
      GATEWAY__LIMITS__CONNECTIONS_PER_IP: "0"
      GATEWAY__LIMITS__HANDSHAKES_PER_MINUTE_PER_IP: "0"
      GATEWAY__LIMITS__DURABLE_BYTES_PER_MINUTE: "0"
      GATEWAY__LIMITS__NEW_ROOMS_PER_MINUTE: "0"
LIMITS
export COMPOSE_FILE="docker-compose.yml:$scratch/limits.yml"

checker=
is_up=0
clean_up() {
    local status=$?
    trap '' INT TERM
    trap - EXIT
    [ -z "$checker" ] || kill "$checker" 2> /dev/null || true
    if [ "$is_up" = 1 ]; then
        [ "$status" = 0 ] || timeout 30 docker compose logs --no-color --tail 30 >&2 || true
        timeout 180 docker compose --profile traces down --volumes --timeout 20 > "$scratch/down.log" 2>&1 ||
            { cat "$scratch/down.log" >&2; echo "try-stack.sh: could not remove the stack" >&2; }
    fi
    rm -rf "$scratch" "$note"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

begun=0
step_name=
step() { # name
    step_name=$1
    begun=$SECONDS
}
passed() { # details
    printf 'ok    %4d s  %-34s %s\n' $((SECONDS - begun)) "$step_name" "${1:-}"
}
failed() { # reason [file]
    printf 'FAIL  %4d s  %-34s %s\n' $((SECONDS - begun)) "$step_name" "$1"
    [ -z "${2:-}" ] || tail -n 40 "$2" >&2
    exit 1
}
run() { # seconds command...
    local limit=$1
    shift
    timeout "$limit" "$@" > "$scratch/run.log" 2>&1 || failed "$* ended with $?" "$scratch/run.log"
}

gateways() { docker compose ps --status running --quiet gateway; }
count() { gateways | grep -c . || true; }
services() {
    local service
    for service in $(docker compose --profile traces config --services); do
        [[ " $leave_out " == *" $service "* ]] || echo "$service"
    done
}
healthy() {
    local id
    for id in $(gateways); do
        [ "$(docker inspect --format '{{.State.Health.Status}}' "$id")" = healthy ] || return 1
    done
}
until_true() { # seconds what command...
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@"; do
        [ $SECONDS -lt $end ] || failed "$what: not in time"
        sleep 0.5
    done
}
has_count() { [ "$(count)" = "$1" ] && healthy; }

# Starts a delivery check over wss that lasts as long as the fault of the step, and some seconds more.
start_check() {
    timeout $((check_seconds + 150)) "$loadtest" ledger --url "wss://127.0.0.1:$HTTPS_PORT/ws" \
        --ca "$scratch/tls.crt" --rooms 10 --members 6 --rate 100/s --duration "${1:-$check_seconds}s" --json \
        > "$scratch/check.json" 2> "$scratch/check.log" &
    checker=$!
    sleep 3
}
# A number of the report.
of_check() { # name
    sed -n "s/.*\"$1\":\([0-9]*\).*/\1/p" "$scratch/check.json" | sed -n 1p
}
end_check() {
    local note='' lost
    # Exit code 1 also means that the checker was too slow to measure times, which says nothing about delivery.
    wait "$checker" || note=', times invalid: this machine is busy'
    checker=
    grep -q '"failures":\[\]' "$scratch/check.json" || {
        cat "$scratch/check.json" >> "$scratch/check.log"
        failed "the delivery check found violations" "$scratch/check.log"
    }
    lost="$(of_check lost) lost, $(of_check duplicated) doubled, $(of_check out_of_order) reordered, $(of_check gaps) gaps"
    passed "$(of_check acknowledged) acknowledged, $(of_check delivered) delivered: $lost$note"
}

step "Docker engine and Compose"
[ -x "$loadtest" ] || failed "$loadtest does not exist: cargo build --release -p loadtest"
run 20 docker info
run 20 docker compose version
run 30 docker compose --profile traces config --quiet
passed "$(docker version --format '{{.Server.Version}}'), Compose $(docker compose version --short)"

step "build"
is_up=1
run "$build_max" docker compose build gateway nginx
passed "gateway $(docker image inspect --format '{{.Size}}' "$GATEWAY_IMAGE" | awk '{ printf "%.0f MB", $1 / 1e6 }')"

step "up, 3 gateways"
mapfile -t wanted < <(services)
run 240 docker compose up --wait --scale gateway=3 "${wanted[@]}"
until_true 30 "three healthy gateways" has_count 3
run 20 docker compose cp nginx:/etc/nginx/tls/tls.crt "$scratch/tls.crt"
passed "${wanted[*]}"

step "nginx' own figures"
if [[ " ${wanted[*]} " == *" nginx-exporter "* ]]; then
    # The exporter's image has no shell, so another container asks it.
    run 20 docker compose exec -T nginx curl -fsS http://nginx-exporter:9113/metrics
    grep -q '^nginx_up 1' "$scratch/run.log" || failed "nginx_up is not 1" "$scratch/run.log"
    passed "$(grep '^nginx_connections_active' "$scratch/run.log")"
fi
run 20 docker compose exec -T nginx curl -sk -o /dev/null -w '%{http_code}' https://127.0.0.1/stub_status
! grep -qx 200 "$scratch/run.log" || failed "clients can read /stub_status" "$scratch/run.log"

step "delivery check"
start_check
end_check

step "one gateway killed"
start_check
victim=$(gateways | sed -n 1p)
run 20 docker kill --signal KILL "$victim"
end_check
# A container that was killed by hand is not restarted.
run 60 docker start "$victim"
until_true 60 "three healthy gateways" has_count 3

step "scale to 5"
start_check
run 120 docker compose up --detach --wait --no-recreate --no-deps --scale gateway=5 gateway
until_true 30 "five healthy gateways" has_count 5
end_check

step "scale to 2"
start_check $((check_seconds + 40))
run 240 docker compose up --detach --no-recreate --no-deps --scale gateway=2 gateway
until_true 90 "two healthy gateways" has_count 2
end_check

step "rolling update"
before=$(docker image inspect --format '{{.Id}}' "$GATEWAY_IMAGE")
start_check $((check_seconds + 60))
# Another label makes another image.
export SKEIN_CREATED=try-stack-$$
run "$build_max" deploy/rolling-update.sh
after=$(docker image inspect --format '{{.Id}}' "$GATEWAY_IMAGE")
[ "$before" != "$after" ] || failed "the image did not change"
for id in $(gateways); do
    [ "$(docker inspect --format '{{.Image}}' "$id")" = "$after" ] || failed "a gateway has the old image"
done
end_check

step "Redis restarts"
start_check
run 60 docker compose restart redis
end_check

step "down"
run 180 docker compose --profile traces down --volumes --timeout 90
left=$(docker ps --all --quiet --filter "label=com.docker.compose.project=$COMPOSE_PROJECT_NAME")
[ -z "$left" ] || failed "containers are left"
is_up=0
passed "nothing is left"
