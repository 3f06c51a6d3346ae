#!/bin/sh
# Renders a configuration of HAProxy, Caddy, Envoy or Traefik for gateways to standard output. `render.sh --help`.
#
# All of them do what nginx/nginx.conf.template does, as far as they can: returning clients go to the gateway that
# `?node=` or the cookie gw_node names, new ones to the gateway with the fewest clients, nobody to one that is not ready;
# gateways see the address of the client, and the admin listener is not reachable. docs/operations.md has the
# differences.
set -eu
export LC_ALL=C

usage() {
    cat <<'HELP'
Usage: render.sh haproxy|caddy|envoy|traefik|traefik-static --listen IP:PORT --node IP:PORT [--node IP:PORT]...
                 [--cert FILE --key FILE]

  --listen IP:PORT   where clients connect; with --cert it is TLS
  --node IP:PORT     the public listener of one gateway, as the proxy dials it; repeat it for each
  --cert, --key      PEM files; HAProxy wants FILE.crt and FILE.key beside each other

haproxy (>= 2.4):   haproxy -f FILE
caddy (>= 2.6):     caddy run --adapter caddyfile --config FILE
envoy (>= 1.27):    envoy -c FILE
traefik (>= 3.4):   traefik --configFile STATIC, whose text `traefik-static` prints; it reads `traefik` from
                    /etc/traefik/skein.yml
HELP
}

fail() {
    echo "render.sh: $1" >&2
    exit 2
}

check_address() { # option value
    case $2 in
    *[!0-9.:]* | *:*:* | :* | *:) fail "$1 '$2' is not IP:PORT (IPv4)" ;;
    *.*.*.*:*) ;;
    *) fail "$1 '$2' is not IP:PORT (IPv4)" ;;
    esac
}
check_path() { # option value
    case $2 in
    '' | *[!A-Za-z0-9_./+-]*) fail "$1 '$2' is not a plain path (letters, digits, _ . / + -)" ;;
    esac
}

case ${1:-} in
haproxy | caddy | envoy | traefik | traefik-static) proxy=$1 ;;
-h | --help) usage; exit 0 ;;
*) usage >&2; exit 2 ;;
esac
shift
listen='' nodes='' cert='' key=''
while [ $# -gt 0 ]; do
    [ $# -ge 2 ] || fail "$1 needs a value, or is unknown (see --help)"
    case $1 in
    --listen) check_address "$1" "$2" && listen=$2 ;;
    --node) check_address "$1" "$2" && nodes="$nodes $2" ;;
    --cert) check_path "$1" "$2" && cert=$2 ;;
    --key) check_path "$1" "$2" && key=$2 ;;
    *) fail "unknown option $1 (see --help)" ;;
    esac
    shift 2
done
[ -n "$listen" ] || fail '--listen is missing'
[ -n "$nodes" ] || fail 'at least one --node is needed'
[ -z "$cert$key" ] || { [ -n "$cert" ] && [ -n "$key" ]; } || fail '--cert and --key belong together'

# The route of a gateway is the md5 of the address that the proxy dials.
route() { printf %s "$1" | md5sum | cut -d ' ' -f 1; }
# The number of a node, from 1.
each() { # function
    index=0
    for node in $nodes; do
        index=$((index + 1))
        "$1" "$index" "$node" "$(route "$node")"
    done
}
echo "# Rendered by deploy/proxies/render.sh $proxy."

haproxy() {
    cat <<'CONF'
global
    log stdout format raw local0
    # Two descriptors per client; the limit of the process is inherited (ulimit -n).
    # The key of tls.crt is tls.key.
    ssl-load-extra-del-ext
    ssl-default-bind-options ssl-min-ver TLSv1.2

defaults
    mode http
    log global
    # Queries carry tokens: %HP is the path without the query.
    log-format '{"client":"%ci","method":"%HM","path":"%HP","status":%ST,"bytes":%B,"ms":%Ta,"gateway":"%s","retries":%rc,"state":"%ts"}'
    timeout http-request 10s
    timeout connect 1s
    # A gateway pings every 25 s, so that 75 s are three missed pings.
    timeout client 75s
    timeout server 75s
    timeout tunnel 75s
    timeout http-keep-alive 10s
    # A gateway answers 503 only for its own state (draining, full, no bus). Another one may take the handshake.
    retries 3
    option redispatch 1
    retry-on conn-failure empty-response 502 503 504

frontend clients
CONF
    if [ -n "$cert" ]; then
        echo "    bind $listen ssl crt $cert alpn h2,http/1.1"
        echo '    http-request set-header X-Forwarded-Proto https'
    else
        echo "    bind $listen"
        echo '    http-request set-header X-Forwarded-Proto http'
    fi
    cat <<'CONF'
    # Replaced, not appended to: with one entry a client cannot forge its address.
    http-request set-header X-Forwarded-For %[src]
    http-request del-header Forwarded
    unique-id-format %{+X}o%ci%cp%Ts%rt
    http-request set-header X-Request-ID %[unique-id]
    http-request deny deny_status 404 if { path_beg /metrics }
    default_backend gateways

backend gateways
    balance leastconn
    # Only what can be repeated is sent twice.
    http-request disable-l7-retry unless METH_GET
    option httpchk
    http-check send meth GET uri /ready hdr Host gateway
    http-check expect status 200
    # Read from the client; the gateway sets it. A client without it, or whose gateway is away, gets another one.
    cookie gw_node
    # Existing connections of a gateway that drains are left alone.
    default-server check inter 1s fall 2 rise 1
CONF
    each haproxy_use
    each haproxy_server
}
haproxy_use() { echo "    use-server n$1 if { url_param(node) $3 }"; }
haproxy_server() { echo "    server n$1 $2 cookie $3"; }

caddy_upstreams() { # preferred node first
    printf '%s' "$1"
    for other in $nodes; do
        [ "$other" = "$1" ] || printf ' %s' "$other"
    done
}
caddy_proxy() { # policy upstreams
    cat <<CONF
		reverse_proxy $2 {
			lb_policy $1
			# A gateway that does not answer costs the handshake this much longer.
			lb_try_duration 5s
			lb_try_interval 50ms
			health_uri /ready
			health_interval 1s
			health_timeout 1s
			health_status 200
			# Caddy replaces X-Forwarded-For with the address it saw, unless trusted_proxies names the sender.
			header_up -Forwarded
			header_up X-Request-ID {http.request.uuid}
			transport http {
				dial_timeout 1s
				versions 1.1
			}
		}
CONF
}
caddy_by_query() {
    cat <<CONF
	@query$1 query node=$3
	handle @query$1 {
$(caddy_proxy first "$(caddy_upstreams "$2")")
	}
CONF
}
caddy_by_cookie() {
    cat <<CONF
	@cookie$1 {
		vars {http.request.cookie.gw_node} $3
		not query node=*
	}
	handle @cookie$1 {
$(caddy_proxy first "$(caddy_upstreams "$2")")
	}
CONF
}
caddy() {
    cat <<CONF
{
	admin off
	auto_https off
	servers {
		timeouts {
			read_header 10s
		}
	}
}

$([ -n "$cert" ] && echo https || echo http)://$listen {
$([ -z "$cert" ] || printf '\ttls %s %s' "$cert" "$key")
	# Caddy's access log is off: it would contain the queries, and with them tokens.
	@private path /metrics /metrics/*
	handle @private {
		respond 404
	}
	# The gateway that the client names comes first, and the others while it is not ready.
CONF
    each caddy_by_query
    each caddy_by_cookie
    cat <<CONF
	handle {
$(caddy_proxy least_conn "$(echo $nodes)")
	}
}
CONF
}

envoy_endpoint() {
    cat <<CONF
                - endpoint: { address: { socket_address: { address: ${2%:*}, port_value: ${2##*:} } } }
CONF
}
envoy_cluster() { # name endpoints
    cat <<CONF
    - name: $1
      type: STATIC
      connect_timeout: 1s
      lb_policy: LEAST_REQUEST
      # Without it, Envoy uses gateways that are not ready once half of them are.
      common_lb_config: { healthy_panic_threshold: { value: 0 } }
      # A WebSocket is a request for as long as it is open.
      circuit_breakers:
        thresholds: [{ max_connections: 1000000, max_pending_requests: 100000, max_requests: 1000000, max_retries: 1000 }]
      health_checks:
        - timeout: 1s
          interval: 1s
          no_traffic_interval: 1s
          unhealthy_threshold: 2
          healthy_threshold: 1
          http_health_check: { path: /ready }
      load_assignment:
        cluster_name: $1
        endpoints:
          - lb_endpoints:
$2
CONF
}
envoy_node_clusters() {
    envoy_cluster "n$1" "$(envoy_endpoint "$1" "$2")"
    cat <<CONF
    # That gateway, and any other while it is not ready.
    - name: n$1-first
      connect_timeout: 1s
      lb_policy: CLUSTER_PROVIDED
      cluster_type:
        name: envoy.clusters.aggregate
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.clusters.aggregate.v3.ClusterConfig
          clusters: [n$1, gateways]
CONF
}
# A WebSocket has no time limit; stream_idle_timeout ends it after three missed pings.
envoy_to() { # cluster
    cat <<CONF
                          route:
                            cluster: $1
                            timeout: 0s
                            retry_policy: *retries
CONF
}
envoy_by_query() {
    cat <<CONF
                        - match: { prefix: /, query_parameters: [{ name: node, string_match: { exact: $3 } }] }
$(envoy_to "n$1-first")
CONF
}
envoy_by_cookie() {
    cat <<CONF
                        - match: { prefix: /, headers: [{ name: cookie, string_match: { contains: gw_node=$3 } }] }
$(envoy_to "n$1-first")
CONF
}
envoy() {
    cat <<CONF
# There is no admin listener and no access log, which would contain the queries, and with them tokens.
static_resources:
  listeners:
    - name: clients
      address: { socket_address: { address: ${listen%:*}, port_value: ${listen##*:} } }
      filter_chains:
        - filters:
            - name: envoy.filters.network.http_connection_manager
              typed_config:
                "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
                stat_prefix: clients
                codec_type: AUTO
                upgrade_configs: [{ upgrade_type: websocket }]
                # The address that Envoy sees becomes the only entry, so that a client cannot forge one.
                use_remote_address: true
                early_header_mutation_extensions:
                  - name: envoy.http.early_header_mutation.header_mutation
                    typed_config:
                      "@type": type.googleapis.com/envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation
                      mutations: [{ remove: x-forwarded-for }, { remove: forwarded }]
                request_headers_timeout: 10s
                stream_idle_timeout: 75s
                normalize_path: true
                http_filters:
                  - name: envoy.filters.http.router
                    typed_config: { "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }
                route_config:
                  virtual_hosts:
                    - name: gateways
                      domains: ["*"]
                      routes:
                        - match: { prefix: /metrics }
                          direct_response: { status: 404 }
                        # A call of the API is not repeated.
                        - match: { prefix: /api/ }
                          route: { cluster: gateways, timeout: 30s }
                        - match: { path: /ready }
                          route:
                            cluster: gateways
                            retry_policy: &retries
                              retry_on: connect-failure,refused-stream,reset-before-request,retriable-status-codes
                              retriable_status_codes: [502, 503, 504]
                              num_retries: 3
                              retry_host_predicate:
                                - name: envoy.retry_host_predicates.previous_hosts
                                  typed_config: { "@type": type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate }
                              host_selection_retry_max_attempts: 3
CONF
    each envoy_by_query
    cat <<CONF
                        # Another \`node\`, such as \`any\`, outranks the cookie.
                        - match: { prefix: /, query_parameters: [{ name: node, present_match: true }] }
$(envoy_to gateways)
CONF
    each envoy_by_cookie
    cat <<CONF
                        - match: { prefix: / }
$(envoy_to gateways)
CONF
    [ -z "$cert" ] || cat <<CONF
          transport_socket:
            name: envoy.transport_sockets.tls
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
              common_tls_context:
                # WebSockets over HTTP/2 would need another setting; browsers use HTTP/1.1 then.
                alpn_protocols: [http/1.1]
                tls_certificates:
                  - { certificate_chain: { filename: $cert }, private_key: { filename: $key } }
CONF
    echo '  clusters:'
    envoy_cluster gateways "$(each envoy_endpoint)"
    each envoy_node_clusters
}

traefik_server() { echo "          - url: http://$2"; }
traefik_service() { # name servers
    cat <<CONF
    $1:
      loadBalancer:
        strategy: p2c
        passHostHeader: true
        serversTransport: gateways
        healthCheck: { path: /ready, interval: 1s, timeout: 1s }
        servers:
$2
CONF
}
traefik_services() {
    traefik_service "n$1" "$(traefik_server "$1" "$2")"
    cat <<CONF
    n$1-first:
      failover: { service: n$1, fallback: gateways, healthCheck: {} }
CONF
}
traefik_router() { # name rule service priority [once]
    cat <<CONF
    $1:
      entryPoints: [clients]
      rule: $2
      service: $3
      priority: $4
CONF
    [ -n "${5:-}" ] || echo '      middlewares: [again]'
    [ -z "$cert" ] || echo '      tls: {}'
}
traefik_routers() {
    traefik_router "query$1" "Query(\`node\`, \`$3\`)" "n$1-first" 300
    traefik_router "cookie$1" "HeaderRegexp(\`Cookie\`, \`(^|; ?)gw_node=$3(;|\$)\`)" "n$1-first" 100
}
traefik() {
    cat <<'CONF'
http:
  serversTransports:
    gateways:
      forwardingTimeouts: { dialTimeout: 1s }
  middlewares:
    # Not for the API, whose calls must not be repeated.
    again:
      retry: { attempts: 3, initialInterval: 50ms }
  routers:
CONF
    traefik_router metrics 'PathPrefix(`/metrics`)' noop@internal 1000 once
    traefik_router api 'PathPrefix(`/api/`)' gateways 900 once
    traefik_router any 'QueryRegexp(`node`, `.*`)' gateways 200
    each traefik_routers
    traefik_router everything 'PathPrefix(`/`)' gateways 1
    echo '  services:'
    traefik_service gateways "$(each traefik_server)"
    each traefik_services
    [ -z "$cert" ] || cat <<CONF
tls:
  certificates:
    - { certFile: $cert, keyFile: $key }
CONF
}
traefik_static() {
    cat <<CONF
# No API, no dashboard, no access log (it would contain the queries, and with them tokens). forwardedHeaders is not
# set: Traefik replaces X-Forwarded-For with the address it saw.
entryPoints:
  clients:
    address: $listen
    transport:
      respondingTimeouts: { readTimeout: 0s, writeTimeout: 0s, idleTimeout: 75s }
providers:
  file: { filename: /etc/traefik/skein.yml }
CONF
}

case $proxy in
traefik-static) traefik_static ;;
*) "$proxy" ;;
esac
