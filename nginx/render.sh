#!/bin/sh
# Renders nginx/nginx.conf.template to standard output. `nginx/render.sh --help` describes the options.
set -eu
# Character ranges mean ASCII.
export LC_ALL=C

usage() {
    cat <<'HELP'
Usage: render.sh sticky --cert FILE --key FILE [option...]
       render.sh map --listen ADDRESS --node IP:PORT [--node IP:PORT]... [option...]

sticky: nginx >= 1.29.6; finds the gateways by DNS name and follows scaling. Used by the compose stack.
map:    nginx >= 1.22; gateways are the --node addresses. All paths are relative to the prefix:
        mkdir DIR && render.sh map ... > DIR/nginx.conf && nginx -p DIR -c nginx.conf -e error.log

  --listen ADDRESS      plain HTTP: a port or IP:PORT (sticky: 80)
  --tls-listen ADDRESS  HTTPS and wss; needs --cert and --key (sticky: 443)
  --cert FILE           certificate chain, PEM
  --key FILE            private key of the certificate, PEM
  --https-port PORT     plain HTTP returns only 301 to https://…:PORT (sticky: 443; map: no redirect)
  --node IP:PORT        map: one gateway, as nginx dials it; repeat it for each
  --gateway NAME:PORT   sticky: DNS name and port of all gateways (gateway:8080)
  --resolver ADDRESS    sticky: DNS server for that name (127.0.0.11)
  --connections-per-ip N             open WebSockets and event streams per client address, 0 = no limit
                                     (sticky: 200, map: 0)
  --handshakes-per-second-per-ip N   sustained; twice as many in a burst; 0 = no limit (sticky: 20, map: 0)
  --status-listen ADDRESS            nginx' own counts, GET /stub_status; publish it to nobody (sticky: 8081; map: none)
  --real-ip-from CIDR   a proxy in front whose X-Forwarded-For is trusted; may be repeated
  --workers N           worker processes; 0 = a single process without workers that outlive it, for tests
                        (one per core)
  --worker-connections N             slots per worker process, 2 for each client (sticky: 131072, map: 16384)
HELP
}

fail() {
    echo "render.sh: $1" >&2
    exit 2
}

# Every value becomes part of the configuration, so characters that could end or start a directive are rejected.
check() { # option value allowed-characters what-is-wanted
    [ -n "$2" ] || fail "$1 is empty; it must be $4"
    case $2 in
    *[!$3]*) fail "$1 '$2' is not $4" ;;
    esac
}

check_number() { # option value
    check "$1" "$2" '0-9' 'a whole number'
    [ ${#2} -le 9 ] || fail "$1 '$2' is too large"
}

check_port() { # option value
    check_number "$1" "$2"
    { [ "$2" -ge 1 ] && [ "$2" -le 65535 ]; } || fail "$1 '$2' is not a port (1 to 65535)"
}

check_listen() { # option value
    check "$1" "$2" '][0-9a-fA-F.:' 'a port or IP:PORT'
    check_port "$1" "${2##*:}"
}

# A route is the md5 of exactly this text on both sides. The gateway hashes an address, so a host name would not match.
check_node() { # value
    check --node "$1" '][0-9a-fA-F.:' 'IP:PORT (an address, not a host name)'
    case $1 in
    *.*.*.*:* | '['*:*']':*) ;;
    *) fail "--node '$1' is not IP:PORT (IPv6 in brackets)" ;;
    esac
    check_port --node "${1##*:}"
}

route() { # node
    if command -v md5sum > /dev/null; then
        printf %s "$1" | md5sum | cut -d ' ' -f 1
    elif command -v openssl > /dev/null; then
        printf %s "$1" | openssl md5 -r | cut -d ' ' -f 1
    else
        fail 'neither md5sum nor openssl is installed'
    fi
}

[ $# -gt 0 ] || { usage >&2; exit 2; }
rendering=$1
shift
listen='' tls_listen='' status_listen='' cert='' key='' https_port='' nodes='' real_ip_from=''
gateway=gateway:8080 resolver=127.0.0.11 workers=auto
case $rendering in
sticky)
    listen=80 tls_listen=443 status_listen=8081 https_port=443
    connections_per_ip=200 handshakes_per_ip=20 worker_connections=131072
    ;;
map) connections_per_ip=0 handshakes_per_ip=0 worker_connections=16384 ;;
-h | --help)
    usage
    exit 0
    ;;
*) fail "'$rendering' is not a rendering; use sticky or map (see --help)" ;;
esac

while [ $# -gt 0 ]; do
    option=$1
    case $option in
    -h | --help)
        usage
        exit 0
        ;;
    --*) ;;
    *) fail "unexpected argument '$option' (see --help)" ;;
    esac
    [ $# -ge 2 ] || fail "$option needs a value, or is unknown (see --help)"
    value=$2
    shift 2
    case $rendering:$option in
    *:--listen) check_listen "$option" "$value" && listen=$value ;;
    *:--tls-listen) check_listen "$option" "$value" && tls_listen=$value ;;
    *:--status-listen) check_listen "$option" "$value" && status_listen=$value ;;
    *:--cert) check "$option" "$value" 'A-Za-z0-9_./+-' 'a plain path (letters, digits, _ . / + -)' && cert=$value ;;
    *:--key) check "$option" "$value" 'A-Za-z0-9_./+-' 'a plain path (letters, digits, _ . / + -)' && key=$value ;;
    *:--https-port) check_port "$option" "$value" && https_port=$value ;;
    *:--connections-per-ip) check_number "$option" "$value" && connections_per_ip=$value ;;
    *:--handshakes-per-second-per-ip) check_number "$option" "$value" && handshakes_per_ip=$value ;;
    *:--workers) check_number "$option" "$value" && workers=$value ;;
    *:--worker-connections) check_number "$option" "$value" && worker_connections=$value ;;
    *:--real-ip-from) check "$option" "$value" '0-9a-fA-F.:/' 'an address or CIDR' && real_ip_from="$real_ip_from $value" ;;
    map:--node) check_node "$value" && nodes="$nodes $value" ;;
    sticky:--gateway) check "$option" "$value" 'A-Za-z0-9_.:-' 'NAME:PORT' && gateway=$value ;;
    sticky:--resolver) check "$option" "$value" '][0-9a-fA-F.:' 'an address' && resolver=$value ;;
    *) fail "unknown option $option for the rendering '$rendering' (see --help)" ;;
    esac
done

[ -n "$listen$tls_listen" ] || fail 'nothing to listen on: give --listen or --tls-listen'
if [ -n "$tls_listen" ]; then
    { [ -n "$cert" ] && [ -n "$key" ]; } || fail '--tls-listen needs --cert and --key'
elif [ -n "$cert$key$https_port" ]; then
    fail '--cert, --key and --https-port need --tls-listen'
fi
[ "$worker_connections" -ge 64 ] || fail '--worker-connections must be at least 64'
if [ "$rendering" = map ]; then
    [ -n "$nodes" ] || fail 'the rendering map needs at least one --node'
    # shellcheck disable=SC2086 # split on purpose: addresses hold no blanks
    repeated=$(printf '%s\n' $nodes | sort | uniq -d | head -n 1)
    [ -z "$repeated" ] || fail "--node $repeated is given twice"
fi

# Conditions that hold, for `#@if`.
holds=" $rendering "
[ -z "$tls_listen" ] || holds="$holds tls "
[ -z "$status_listen" ] || holds="$holds status "
if [ -n "$https_port" ] && [ -n "$listen" ]; then
    holds="$holds redirect "
elif [ -n "$listen" ]; then
    holds="$holds plain "
fi
if [ "$workers" = 0 ]; then holds="$holds single "; else holds="$holds workers "; fi
[ "$connections_per_ip" -eq 0 ] || holds="$holds connections_per_ip "
[ "$handshakes_per_ip" -eq 0 ] || holds="$holds handshakes_per_ip "
[ -z "$real_ip_from" ] || holds="$holds real_ip "

# Values of the words in @…@.
newline='
'
peer='max_fails=0'
node_routes='' node_servers='' node_pools='' index=0
for node in $nodes; do
    node_routes="$node_routes        $(route "$node") gateway_$index;$newline"
    node_servers="$node_servers        server $node $peer;$newline"
    # Group for returning clients of one gateway: that gateway, with the others as backup while it is down or returns
    # 503.
    node_pools="$node_pools    upstream gateway_$index {
        zone gateway_$index 64k;
        least_conn;
        server $node $peer;
"
    for other in $nodes; do
        [ "$other" = "$node" ] || node_pools="$node_pools        server $other $peer backup;$newline"
    done
    node_pools="$node_pools    }$newline"
    index=$((index + 1))
done
real_ip_lines=''
for cidr in $real_ip_from; do
    real_ip_lines="$real_ip_lines    set_real_ip_from $cidr;$newline"
done
pool=gateways
# shellcheck disable=SC2016 # nginx's variable
[ "$rendering" = sticky ] || pool='$gateway_pool'
https_port_suffix=":$https_port"
[ "$https_port" != 443 ] || https_port_suffix=''

export RENDERING="$rendering" LISTEN="$listen" TLS_LISTEN="$tls_listen" STATUS_LISTEN="$status_listen" CERT="$cert" KEY="$key" HTTPS_PORT_SUFFIX="$https_port_suffix"
export GATEWAY="$gateway" RESOLVER="$resolver" WORKERS="$workers" POOL="$pool" WORKER_CONNECTIONS="$worker_connections"
export SLOT_MEMORY="$(((worker_connections * 43 / 100 + 1023) / 1024)) MiB"
export CONNECTIONS_PER_IP="$connections_per_ip" HANDSHAKES_PER_IP="$handshakes_per_ip"
export HANDSHAKES_BURST="$((handshakes_per_ip * 2))"
export NODE_ROUTES="${node_routes%"$newline"}" NODE_SERVERS="${node_servers%"$newline"}"
export NODE_POOLS="${node_pools%"$newline"}" REAL_IP_FROM="${real_ip_lines%"$newline"}"

exec awk -v holds="$holds" '
    function stop(message) {
        print "render.sh: template line " NR ": " message | "cat >&2"
        failed = 1
        exit 1
    }
    function fill(line,    done, word) {
        while (match(line, /@[A-Z][A-Z_]*@/)) {
            word = substr(line, RSTART + 1, RLENGTH - 2)
            if (!(word in ENVIRON)) stop("unknown word @" word "@")
            done = done substr(line, 1, RSTART - 1) ENVIRON[word]
            line = substr(line, RSTART + RLENGTH)
        }
        return done line
    }
    /^#@if / {
        wanted = index(holds, " " $NF " ") > 0
        depth++
        kept[depth] = wanted && (depth == 1 || kept[depth - 1])
        next
    }
    /^#@end$/ {
        if (depth == 0) stop("#@end without #@if")
        depth--
        next
    }
    /^#@/ { stop("unknown instruction " $1) }
    depth == 0 || kept[depth] { print fill($0) }
    END { if (!failed && depth > 0) stop("#@if without #@end") }
' "$(dirname "$0")/nginx.conf.template"
