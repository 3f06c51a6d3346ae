#!/usr/bin/env bash
# Runs a cluster as processes of this machine: Redis, gateways, nginx. `make cluster` calls it.
#
# Ctrl-C or SIGTERM stops everything and leaves nothing behind. If a process ends by itself, the cluster ends, and the
# last lines of the log of that process are printed. With KEEP=1 the cluster goes on without a gateway that ended, as
# long as one is left: the list at the start has the process ids (`kill -9 PID`). Clients may use any name; all
# listeners are on loopback.
#
#   KEEP=0               1: a gateway that ends does not end the cluster
#   NODES=3              number of gateways
#   PORT=8080            nginx: the page, WebSockets, API
#   NODE_PORT=9001       first gateway; the others have the following ports
#   ADMIN_PORT=9101      admin listener of the first gateway; the others have the following ports
#   REDIS_PORT=6390
#   GATEWAY_BIN=target/release/gateway
#
# Other GATEWAY__ variables of the environment are passed on to the gateways.
set -euo pipefail
cd "$(dirname "$0")/.."

nodes=${NODES:-3}
port=${PORT:-8080}
node_port=${NODE_PORT:-9001}
admin_port=${ADMIN_PORT:-9101}
redis_port=${REDIS_PORT:-6390}
gateway=${GATEWAY_BIN:-target/release/gateway}
keep=${KEEP:-0}

fail() {
    echo "cluster.sh: $1" >&2
    exit 1
}

[ "${BASH_VERSINFO[0]}" -ge 5 ] || fail "needs bash 5, this is $BASH_VERSION"
for tool in redis-server redis-cli nginx; do
    # Debian installs nginx in a directory that only root's PATH has.
    PATH=$PATH:/usr/sbin:/usr/local/sbin
    command -v "$tool" > /dev/null || fail "$tool is not installed"
done
[ -x "$gateway" ] || fail "$gateway does not exist: run cargo build --release -p gateway, or set GATEWAY_BIN"
[[ $nodes =~ ^[1-9][0-9]?$ ]] || fail "NODES is '$nodes'; it must be 1 to 99"
[[ $keep =~ ^[01]$ ]] || fail "KEEP is '$keep'; it must be 0 or 1"

# Each client needs two file descriptors of nginx and one of a gateway.
ulimit -n "$(ulimit -Hn)"

scratch=$(mktemp -d "${TMPDIR:-/tmp}/skein-cluster.XXXXXX")
# If started as root, nginx runs its workers as another user, which must be able to enter the directory.
chmod 711 "$scratch"
declare -A name_of=()

# Gateways stop first, while Redis still runs. A second SIGTERM makes them exit without waiting for clients.
stop() {
    trap '' INT TERM
    trap - EXIT
    stop_all gateway TERM TERM KILL
    stop_all nginx TERM KILL
    stop_all redis TERM KILL
    rm -rf "$scratch"
}

stop_all() { # name-prefix signal...
    local prefix=$1 signal pid deadline left
    shift
    for signal in "$@"; do
        left=()
        for pid in "${!name_of[@]}"; do
            if [[ ${name_of[$pid]} == "$prefix"* ]] && kill -0 "$pid" 2> /dev/null; then
                kill -s "$signal" "$pid" 2> /dev/null || true
                left+=("$pid")
            fi
        done
        deadline=$((SECONDS + 5))
        while [ ${#left[@]} -gt 0 ] && [ $SECONDS -lt $deadline ]; do
            kill -0 "${left[0]}" 2> /dev/null && sleep 0.05 || left=("${left[@]:1}")
        done
        [ ${#left[@]} -gt 0 ] || return 0
    done
}

trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

start() { # name command...
    local name=$1
    shift
    "$@" > "$scratch/$name.log" 2>&1 < /dev/null &
    name_of[$!]=$name
}

# Ends the cluster if a process has ended, and prints which one. A gateway may be missing once all have started and KEEP
# is 1, but not the last one.
is_started=0
check_alive() {
    local pid
    for pid in "${!name_of[@]}"; do
        kill -0 "$pid" 2> /dev/null && continue
        local name=${name_of[$pid]} status=0
        wait "$pid" || status=$?
        {
            echo "cluster.sh: $name ended with status $status. Its last lines:"
            tail -n 20 "$scratch/$name.log"
            # nginx logs to a file once it has read its configuration.
            [ "$name" != nginx ] || tail -n 20 "$scratch/error.log" 2> /dev/null || true
        } >&2
        unset "name_of[$pid]"
        [[ $keep = 1 && $is_started = 1 && $name == gateway-* ]] || exit 1
        echo "cluster.sh: the cluster goes on without $name" >&2
        [[ " ${name_of[*]}" == *" gateway-"* ]] || fail "no gateway is left"
    done
}

wait_for() { # what command...
    local what=$1 deadline=$((SECONDS + 20))
    shift
    until "$@"; do
        check_alive
        [ $SECONDS -lt $deadline ] || fail "$what does not answer after 20 s; its log is $(tail -n 5 "$scratch/$what.log")"
        sleep 0.05
    done
    check_alive
}

# Whether the Redis of this script answers, and not another one on the same port.
redis_answers() {
    redis-cli -p "$redis_port" info server 2> /dev/null | grep -q "^process_id:${redis_pid}[^0-9]*$"
}

# Whether GET /ready returns 200. Written by hand, so that no HTTP client is needed.
ready() { # port
    local answer=
    exec 3<> "/dev/tcp/127.0.0.1/$1" || return 1
    printf 'GET /ready HTTP/1.1\r\nHost: 127.0.0.1:%s\r\nConnection: close\r\n\r\n' "$1" >&3
    IFS= read -r -t 1 answer <&3 || true
    exec 3>&-
    [[ $answer == "HTTP/1.1 200 "* ]]
} 2> /dev/null

start redis redis-server --bind 127.0.0.1 --port "$redis_port" --dir "$scratch" --save '' --appendonly yes \
    --maxmemory-policy noeviction
redis_pid=$!
wait_for redis redis_answers

export GATEWAY__CLUSTER__REDIS_URL=redis://127.0.0.1:$redis_port/
export GATEWAY__AUTH__MODE=anonymous GATEWAY__AUTH__ALLOW_ANONYMOUS=true
# All clients have one address here, which nginx forwards.
export GATEWAY__SERVER__TRUSTED_PROXIES=127.0.0.1/32
export GATEWAY__LIMITS__CONNECTIONS_PER_IP=0 GATEWAY__LIMITS__HANDSHAKES_PER_MINUTE_PER_IP=0
export GATEWAY__LIMITS__DURABLE_BYTES_PER_MINUTE=0 GATEWAY__LIMITS__NEW_ROOMS_PER_MINUTE=0

node_arguments=()
for ((i = 0; i < nodes; i++)); do
    GATEWAY__SERVER__LISTEN=127.0.0.1:$((node_port + i)) GATEWAY__ADMIN__LISTEN=127.0.0.1:$((admin_port + i)) \
        GATEWAY__NODE__ID=node-$((i + 1)) start "gateway-$((i + 1))" "$gateway"
    node_arguments+=(--node "127.0.0.1:$((node_port + i))")
done
for ((i = 0; i < nodes; i++)); do
    wait_for "gateway-$((i + 1))" ready $((node_port + i))
done

nginx/render.sh map --listen "127.0.0.1:$port" "${node_arguments[@]}" > "$scratch/nginx.conf"
start nginx nginx -p "$scratch" -c nginx.conf -e error.log
wait_for nginx ready "$port"

pid_of() { # name
    local pid
    for pid in "${!name_of[@]}"; do
        [ "${name_of[$pid]}" != "$1" ] || echo "$pid"
    done
}

is_started=1
echo "page       http://127.0.0.1:$port/"
echo "websocket  ws://127.0.0.1:$port/ws"
for ((i = 0; i < nodes; i++)); do
    echo "node-$((i + 1))     ws://127.0.0.1:$((node_port + i))/ws   metrics http://127.0.0.1:$((admin_port + i))/metrics   pid $(pid_of "gateway-$((i + 1))")"
done
echo "redis      redis://127.0.0.1:$redis_port/   pid $redis_pid"
echo "logs       $scratch"
echo "Ctrl-C stops it."

# Waits until a process ends or a signal arrives.
while :; do
    wait -n || true
    check_alive
done
