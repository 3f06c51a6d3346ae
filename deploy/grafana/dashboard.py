#!/usr/bin/env python3
"""Prints the dashboard: deploy/grafana/dashboard.py > deploy/grafana/dashboards/gateway.json

A panel is one call below, so that a change of it is one line. A test compares the file with this output.
"""

import json

SELECTOR = 'job=~"$job",cluster=~"$cluster",instance=~"$instance"'
WINDOW = "[$__rate_interval]"
DATA_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
RUNBOOK = "http://127.0.0.1:9090/user/runbook.md"
INSTANCE = "{{instance}}"

panels = []
grid = {"x": 0, "y": 0, "h": 0}


def place(width, height):
    """The next free place in the grid of 24 columns."""
    if grid["x"] + width > 24:
        grid.update(x=0, y=grid["y"] + grid["h"], h=0)
    at = {"h": height, "w": width, "x": grid["x"], "y": grid["y"]}
    grid.update(x=grid["x"] + width, h=max(grid["h"], height))
    return at


def row(title):
    if grid["x"]:
        grid.update(x=0, y=grid["y"] + grid["h"], h=0)
    at = {"h": 1, "w": 24, "x": 0, "y": grid["y"]}
    panels.append(
        {"id": len(panels) + 1, "type": "row", "title": title, "collapsed": False, "gridPos": at, "panels": []}
    )
    grid.update(x=0, y=grid["y"] + 1, h=0)


def select(metric, more=""):
    return metric + "{" + SELECTOR + ("," + more if more else "") + "}"


def rate(metric, by="", more=""):
    """Per second, summed over the nodes."""
    return f"sum{' by (' + by + ')' if by else ''} (rate({select(metric, more)}{WINDOW}))"


def increase(metric, window, by="", more=""):
    return f"sum{' by (' + by + ')' if by else ''} (increase({select(metric, more)}[{window}]))"


def quantile(q, metric, by="", more=""):
    groups = by + ", le" if by else "le"
    return f"histogram_quantile({q}, {rate(metric + '_bucket', groups, more)})"


def options_of(kind, unit):
    """Options of a panel, and what its kind adds to the defaults of fields."""
    legend = {"displayMode": "list", "placement": "bottom", "showLegend": True}
    if kind == "timeseries":
        return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}, {}
    if kind == "stat":
        reduce = {"calcs": ["lastNotNull"], "fields": "", "values": False}
        look = {"colorMode": "value", "graphMode": "area", "textMode": "auto"}
        return {"reduceOptions": reduce, **look, "justifyMode": "auto", "orientation": "auto"}, {}
    if kind == "heatmap":
        color = {"mode": "scheme", "scheme": "Oranges", "steps": 64, "exponent": 0.5, "fill": "dark-orange"}
        look = {"calculate": False, "color": color, "cellGap": 1, "rowsFrame": {"layout": "auto"}}
        axis = {"axisPlacement": "left", "unit": unit}
        more = {"tooltip": {"mode": "single", "yHistogram": True}, "legend": {"show": True}}
        return {**look, "yAxis": axis, **more, "filterValues": {"le": 1e-9}}, {
            "custom": {"scaleDistribution": {"type": "linear"}}
        }
    if kind == "state-timeline":
        look = {"mergeValues": True, "showValue": "never", "alignValue": "left", "rowHeight": 0.9}
        return {**look, "legend": legend, "tooltip": {"mode": "single", "sort": "none"}}, {
            "custom": {"fillOpacity": 80, "lineWidth": 0},
            "color": {"mode": "thresholds"},
        }
    assert kind == "table"
    footer = {"show": False, "reducer": ["sum"], "countRows": False, "fields": ""}
    return {"showHeader": True, "cellHeight": "sm", "footer": footer}, {"custom": {"align": "auto", "inspect": False}}


def panel(
    title,
    description,
    *queries,
    unit="short",
    kind="timeseries",
    w=6,
    h=8,
    runbook=(),
    stack=False,
    log=False,
    above=None,
    below=None,
    states=None,
    signed=False,
):
    """`queries` are expressions, or pairs of an expression and the name of its lines. `runbook` are alerts; `above` is
    the value that is bad, `below` the one under which it is bad; `states` the texts of 0 and 1."""
    targets = []
    for letter, query in zip("ABCDEFGH", queries):
        expr, name = query if isinstance(query, tuple) else (query, "")
        target = {"datasource": DATA_SOURCE, "refId": letter, "expr": expr, "legendFormat": name}
        target |= {"editorMode": "code", "range": kind != "table"}
        if kind == "heatmap":
            target["format"] = "heatmap"
        if kind == "table":
            target |= {"format": "table", "instant": True}
        targets.append(target)
    options, defaults = options_of(kind, unit)
    defaults["unit"] = unit
    if kind == "timeseries":
        stacking = {"mode": "normal" if stack else "none", "group": "A"}
        custom = {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 20 if stack else 8, "showPoints": "never"}
        custom["stacking"] = stacking
        if log:
            custom["scaleDistribution"] = {"type": "log", "log": 10}
        elif not signed:
            defaults["min"] = 0
        if above is not None:
            custom["thresholdsStyle"] = {"mode": "dashed"}
        defaults |= {"custom": custom, "color": {"mode": "palette-classic"}}
    steps = [{"color": "text", "value": None}]
    if above is not None:
        steps = [{"color": "green" if kind == "stat" else "text", "value": None}, {"color": "red", "value": above}]
    if below is not None:
        steps = [{"color": "red", "value": None}, {"color": "green", "value": below}]
    defaults["thresholds"] = {"mode": "absolute", "steps": steps}
    if states:
        of = {str(n): {"text": text, "index": n} for n, text in enumerate(states)}
        defaults["mappings"] = [{"type": "value", "options": of}]
    made = {"id": len(panels) + 1, "type": kind, "title": title, "description": description}
    made |= {"datasource": DATA_SOURCE, "gridPos": place(w, h), "targets": targets}
    made |= {"fieldConfig": {"defaults": defaults, "overrides": []}, "options": options}
    if kind == "table":
        hidden = {name: True for name in ["Time", "__name__", "job", "cluster", "Value"]}
        order = {"excludeByName": hidden, "indexByName": {}, "renameByName": {}}
        made["transformations"] = [{"id": "organize", "options": order}]
    if runbook:
        url = "${runbook}#:~:text=%23%23%20"
        made["links"] = [{"title": f"Runbook: {a}", "url": url + a, "targetBlank": True} for a in runbook]
    panels.append(made)


def variable(name, label, query):
    made = {"name": name, "label": label, "type": "query", "datasource": DATA_SOURCE, "definition": query}
    made |= {"query": {"query": query, "refId": name}, "refresh": 2, "sort": 1, "options": []}
    made |= {"includeAll": True, "allValue": ".*", "multi": True}
    return made | {"current": {"selected": True, "text": ["All"], "value": ["$__all"]}}


row("Now")
panel(
    "Active connections",
    "Open client connections on all gateways: WebSockets and event streams.",
    f"sum({select('gateway_connections')})",
    kind="stat",
    w=4,
    h=4,
)
panel(
    "Gateways",
    "Gateways that are ready, and those that the nodes count as live.",
    (f"sum({select('gateway_ready')})", "ready"),
    (f"max({select('gateway_nodes')})", "live"),
    kind="stat",
    w=4,
    h=4,
)
panel(
    "Bus",
    "1 if every gateway can publish to Redis and receive from it.",
    f"min({select('gateway_bus_up')})",
    kind="stat",
    w=4,
    h=4,
    below=1,
    states=["down", "up"],
)
panel(
    "Messages in",
    "Messages published to the bus, per second.",
    rate("gateway_publishes_total"),
    kind="stat",
    w=4,
    h=4,
    runbook=["GatewayNoTraffic"],
)
panel(
    "Deliveries",
    "Log entries placed in the outboxes of members, per second.",
    rate("gateway_deliveries_total"),
    kind="stat",
    w=4,
    h=4,
)
panel(
    "Publish p99",
    "99 of 100 messages are acknowledged within this time.",
    quantile(0.99, "gateway_publish_seconds", more='result="acknowledged"'),
    kind="stat",
    unit="s",
    w=4,
    h=4,
    above=0.25,
)
panel(
    "Is the promise kept?",
    "Signs of loss within the last 10 minutes, of which clients learn: resets, two histories, errors of senders. "
    "All 0: no acknowledged message was lost.",
    (increase("gateway_log_repairs_total", "10m", more='result="reset"'), "resets"),
    (increase("gateway_log_restores_total", "10m", more='result="conflict"'), "conflicts"),
    (increase("gateway_log_restores_total", "10m", more='result="failed"'), "restores that failed"),
    (
        increase("gateway_publishes_total", "10m", more='result=~"unavailable|overloaded|failed"'),
        "publishes that failed",
    ),
    (increase("gateway_unconfirmed_publishes_dropped_total", "10m"), "unconfirmed dropped"),
    kind="stat",
    w=12,
    h=6,
    above=1,
    runbook=["GatewayContinuityLost", "GatewayLogConflict", "GatewayPublishesFailing"],
)
panel(
    "Alerts",
    "Every alert that fires or is about to. Prometheus links each to its entry in the runbook.",
    (
        'ALERTS{cluster=~"$cluster"} or ALERTS{cluster=""}',
        "{{alertname}} {{instance}}{{node}} {{alertstate}}",
    ),
    stack=True,
    w=12,
    h=6,
)

row("Objective")
within = select("gateway_publish_seconds_bucket", 'result="acknowledged",le="0.5"')
every = select("gateway_publish_seconds_count", 'result=~"acknowledged|failed"')
panel(
    "Messages acknowledged within 0.5 s",
    "Share of the messages that are acknowledged within 0.5 s. The objective is 99.9 % over 30 days.",
    (f"sum(rate({within}[2m])) / sum(rate({every}[2m]))", "2 minutes"),
    (f"sum(rate({within}[20m])) / sum(rate({every}[20m]))", "20 minutes"),
    unit="percentunit",
    signed=True,
    runbook=["GatewaySloBurn"],
)
panel(
    "Error budget used",
    "Share of the allowed failed or slow messages (1 of 1,000) used in the time range of the dashboard. Above 1 the "
    "objective is missed at this pace.",
    f"(1 - sum(increase({within}[$__range])) / sum(increase({every}[$__range]))) / 0.001",
    kind="stat",
    unit="percentunit",
    above=1,
    runbook=["GatewaySloBurn"],
)
panel(
    "The site, as a client sees it",
    "1 while the address of the site answers, and the days until its certificate expires.",
    ('probe_success{job="site",cluster=~"$cluster"}', "{{instance}} answers"),
    (
        '(probe_ssl_earliest_cert_expiry{job="site",cluster=~"$cluster"} - time()) / 86400',
        "days of the certificate",
    ),
    runbook=["GatewayUnreachable", "GatewayCertificateExpiring"],
)

panel(
    "nginx",
    "Connections that nginx holds: those of clients and, as many again, those to gateways; and requests per second.",
    ('nginx_connections_active{job="nginx",cluster=~"$cluster"}', "connections"),
    (f'rate(nginx_http_requests_total{{job="nginx",cluster=~"$cluster"}}{WINDOW})', "requests per second"),
)

row("Nodes")
panel(
    "Node state",
    "Green while a node is ready, red while it accepts no clients, empty while Prometheus does not see it.",
    (select("gateway_ready"), INSTANCE),
    kind="state-timeline",
    w=12,
    below=1,
    states=["not ready", "ready"],
    runbook=["GatewayNotReady", "GatewayDown"],
)
panel(
    "Not ready, by reason",
    "Reasons for which `/ready` answers 503.",
    (f"max by (instance, reason) ({select('gateway_not_ready')})", "{{instance}} {{reason}}"),
    runbook=["GatewayNotReady"],
)
panel(
    "Missing nodes",
    "Nodes that have ended without an orderly stop and have not come back.",
    (f"max by (node) ({select('gateway_node_missing')}) or vector(0)", "{{node}}"),
    runbook=["GatewayNodeMissing"],
)
panel("Build", "Node, version and commit of each gateway.", select("gateway_info"), kind="table", w=12)
panel(
    "Uptime",
    "Time since each gateway started.",
    (f"time() - {select('process_start_time_seconds')}", INSTANCE),
    unit="s",
)
panel(
    "Lease",
    "Seconds since each node renewed its lease, and leases lost within 2 minutes. A lease ends after `cluster.lease`.",
    (select("gateway_lease_age_seconds"), INSTANCE),
    (increase("gateway_leases_lost_total", "2m", "instance"), "{{instance}} lost"),
    runbook=["GatewayLeaseLost"],
)
panel(
    "Clock",
    "Seconds that the clock of a node is ahead of that of Redis.",
    (select("gateway_clock_skew_seconds"), INSTANCE),
    unit="s",
    signed=True,
    runbook=["GatewayClockSkew"],
)
panel(
    "Tasks",
    "Live tasks of the async runtime. A rise without more connections or rooms is a leak.",
    (select("gateway_tasks"), INSTANCE),
)
panel(
    "Bugs",
    "Connections ended by a panic, and `internal` errors, within 2 minutes.",
    (increase("gateway_connection_panics_total", "2m", "instance"), "{{instance}} panics"),
    (increase("gateway_errors_total", "2m", "instance", 'code="internal"'), "{{instance}} internal"),
    runbook=["GatewayPanics", "GatewayInternalErrors"],
)

row("Connections")
panel(
    "Connections per gateway",
    "nginx routes a new client to the gateway with the fewest connections, and a returning client to its former one.",
    (select("gateway_connections"), INSTANCE),
    stack=True,
    runbook=["GatewayUneven"],
)
panel(
    "Share of the limit",
    "Connections divided by those that a node accepts (`limits.connections_max`).",
    (f"{select('gateway_connections')} / ({select('gateway_connections_max')} > 0)", INSTANCE),
    unit="percentunit",
    above=0.85,
    runbook=["GatewayConnectionsNearLimit"],
)
panel(
    "Rebalancing",
    "Connections per second that each gateway asks to move to an emptier one.",
    (rate("gateway_rebalanced_connections_total", "instance"), INSTANCE),
    unit="ops",
)
panel(
    "Handshakes",
    "Handshakes per second by result, and those whose client left before the connection was open.",
    (rate("gateway_handshakes_total", "result"), "{{result}}"),
    (rate("gateway_handshakes_abandoned_total"), "abandoned"),
    unit="ops",
    runbook=["GatewayNoTraffic"],
)
panel(
    "Connections refused before the handshake",
    "TCP connections dropped per second by reason, and HTTP requests answered with 429.",
    (rate("gateway_http_connections_dropped_total", "reason"), "{{reason}}"),
    (rate("gateway_http_rate_limited_total"), "429"),
    unit="ops",
)
panel(
    "Disconnects by code",
    "Per second, by WebSocket close code. 1006: no close frame; 1012: the gateway drains; 4002: nothing received from "
    "the client; 4003: nothing could be written to it.",
    (rate("gateway_disconnects_total", "code"), "{{code}}"),
    unit="ops",
    runbook=["GatewayDisconnects"],
)
panel(
    "Errors by code",
    "`error` frames sent to clients per second, by code.",
    (rate("gateway_errors_total", "code"), "{{code}}"),
    unit="ops",
    runbook=["GatewayClientErrors"],
)
panel(
    "Clients that send too much",
    "Per second: pauses in reading a connection by reason, and connections closed for it. Who is flooding?",
    (rate("gateway_input_throttles_total", "reason"), "{{reason}}"),
    (rate("gateway_input_rate_limit_closes_total"), "closed"),
    unit="ops",
    runbook=["GatewayClientErrors"],
)
panel(
    "Guesses",
    "Per second: server API requests rejected because of their key, and room passwords by result.",
    (rate("gateway_api_rejections_total", "reason"), "API key: {{reason}}"),
    (rate("gateway_room_password_checks_total", "result"), "room password: {{result}}"),
    unit="ops",
)
panel(
    "Rooms and inboxes",
    "Rooms and inboxes each gateway is subscribed to. A room with members on three gateways counts three times.",
    (select("gateway_rooms"), INSTANCE),
    (select("gateway_inboxes"), "{{instance}} inboxes"),
)
panel(
    "Members",
    "Room memberships of the connections of each gateway, and users whose status they watch.",
    (select("gateway_members"), INSTANCE),
    (select("gateway_watched_users"), "{{instance}} watched users"),
)

row("Messages")
panel(
    "Time to acknowledge",
    "Time from publishing a message to its acknowledgement, as a heatmap: the way to Redis and back.",
    rate("gateway_publish_seconds_bucket", "le", 'result="acknowledged"'),
    kind="heatmap",
    unit="s",
    w=12,
    runbook=["GatewayPublishSlow"],
)
panel(
    "Publish p99 per gateway",
    "Which node is slow? One line above the others: its link or its CPU. All lines together: Redis.",
    (quantile(0.99, "gateway_publish_seconds", "instance", 'result="acknowledged"'), INSTANCE),
    unit="s",
    w=12,
    log=True,
    runbook=["GatewayPublishSlow"],
)
panel(
    "Publishes",
    "Messages published to the bus per second, by result.",
    (rate("gateway_publishes_total", "result"), "{{result}}"),
    unit="ops",
    runbook=["GatewayPublishesFailing", "GatewayNoTraffic"],
)
panel(
    "Publish p50 and p99",
    "Time from publishing a message to its acknowledgement, and to its failure.",
    (quantile(0.5, "gateway_publish_seconds", more='result="acknowledged"'), "p50"),
    (quantile(0.99, "gateway_publish_seconds", more='result="acknowledged"'), "p99"),
    (quantile(0.99, "gateway_publish_seconds", more='result=~"failed|rejected"'), "p99 of failures"),
    unit="s",
    log=True,
)
panel(
    "Fan-out p50 and p99",
    "Time of one batch of a shard: entries placed in outboxes and written.",
    (quantile(0.5, "gateway_fan_out_seconds"), "p50"),
    (quantile(0.99, "gateway_fan_out_seconds"), "p99"),
    unit="s",
    log=True,
)
panel(
    "Deliveries per gateway",
    "Log entries placed in the outboxes of members, per second.",
    (rate("gateway_deliveries_total", "instance"), INSTANCE),
    unit="ops",
)
panel(
    "Frames in and out",
    "Messages received from clients, and frames written to them, per second.",
    (rate("gateway_frames_received_total"), "in"),
    (rate("gateway_frames_sent_total"), "out"),
    unit="ops",
)
panel(
    "Bytes in and out",
    "Bytes per second on the wire, with frame headers.",
    (rate("gateway_bytes_received_total"), "in"),
    (rate("gateway_bytes_sent_total"), "out"),
    unit="Bps",
)
panel(
    "Ephemeral events",
    "Presence, typing, read marks and the like, per second, and those dropped because a queue was full.",
    (rate("gateway_ephemeral_events_total"), "sent"),
    (rate("gateway_ephemeral_events_dropped_total"), "dropped"),
    unit="ops",
)
panel(
    "Compression",
    "Bytes per second before and after compression, handshakes that negotiated it and messages compressed.",
    (rate("gateway_deflate_input_bytes_total"), "bytes before"),
    (rate("gateway_deflate_output_bytes_total"), "bytes after"),
    (rate("gateway_deflate_handshakes_total"), "handshakes"),
    (rate("gateway_deflated_messages_total"), "messages"),
    log=True,
)
panel(
    "Reads on behalf of clients",
    "Bytes per second read from logs and lists, and reads that waited because of `limits.read_bytes_per_second`.",
    (rate("gateway_client_read_bytes_total"), "bytes"),
    (rate("gateway_client_reads_delayed_total"), "delayed reads"),
)

panel(
    "Traces",
    "Spans per second by result, and requests to trace that were not granted.",
    (rate("gateway_trace_spans_total", "result"), "{{result}}"),
    (rate("gateway_trace_requests_ignored_total"), "requests ignored"),
    unit="ops",
)

row("Signals")
panel(
    "Messages by kind",
    "Messages that clients and the application sent, and those placed in outboxes, per second.",
    (rate("gateway_messages_received_total", "kind"), "in {{kind}}"),
    (rate("gateway_messages_sent_total", "kind"), "out {{kind}}"),
    unit="ops",
)
panel(
    "Delivery p50 and p99",
    "Time from the acceptance of a message on any gateway until it was written to the sockets of this one.",
    (quantile(0.5, "gateway_delivery_seconds"), "p50"),
    (quantile(0.99, "gateway_delivery_seconds"), "p99"),
    unit="s",
    log=True,
)
panel(
    "Handling p99 by frame",
    "Time from reading a frame of a client to its complete handling, by the type of the frame.",
    (quantile(0.99, "gateway_frame_seconds", "type"), "{{type}}"),
    unit="s",
    log=True,
)
panel(
    "Ping p50 and p99",
    "Round trip of pings to clients. A rise of both is the network; a rise of the 99th percentile only, some clients.",
    (quantile(0.5, "gateway_ping_seconds"), "p50"),
    (quantile(0.99, "gateway_ping_seconds"), "p99"),
    unit="s",
    log=True,
)
panel(
    "Canaries",
    "Time that a canary takes from one gateway to another through Redis, the slowest of each sender.",
    (f"max by (from) ({select('gateway_canary_seconds')})", "from {{from}}"),
    unit="s",
)
panel(
    "Handshakes refused by cause",
    "Handshakes that opened no connection, per second.",
    (rate("gateway_handshakes_refused_total", "cause"), "{{cause}}"),
    unit="ops",
)
panel(
    "Joins and reconnects",
    "Joins by result, and connections that continue a session, per second.",
    (rate("gateway_joins_total", "result"), "join {{result}}"),
    (rate("gateway_reconnects_total"), "reconnects"),
    unit="ops",
)
panel(
    "Transports and users",
    "Connections by transport, and users with a connection, summed over the gateways.",
    (f"sum by (transport) ({select('gateway_transport_connections')})", "{{transport}}"),
    (f"sum({select('gateway_users')})", "users"),
)
panel(
    "Outboxes",
    "Bytes that wait for clients: all, and the fullest outbox. Clients that read too slowly fill theirs.",
    (f"sum by (instance) ({select('gateway_outbox_bytes')})", "{{instance}} all"),
    (f"max by (instance) ({select('gateway_outbox_largest_bytes')})", "{{instance}} fullest"),
    unit="bytes",
)
panel(
    "Queued frames and messages",
    "Frames that wait for clients, and messages of the bus that wait for shards.",
    (f"sum({select('gateway_outbox_frames')})", "frames in outboxes"),
    (f"sum({select('gateway_mailbox_messages')})", "messages in mailboxes"),
    (f"max({select('gateway_mailbox_largest_messages')})", "fullest mailbox"),
)
panel(
    "Publishes that wait for Redis",
    "Bytes in the queue of each gateway. Above 64 MiB it answers overloaded.",
    (select("gateway_publish_queue_bytes"), INSTANCE),
    unit="bytes",
)
panel(
    "Server API",
    "Requests per second by status, and the 99th percentile of their time.",
    (rate("gateway_api_requests_total", "status"), "{{status}}"),
    (quantile(0.99, "gateway_api_request_seconds"), "p99, s"),
)

row("Repair")
panel(
    "Bus up",
    "1 while the gateway receives its own probes through Redis. At 0 it rejects handshakes.",
    (select("gateway_bus_up"), INSTANCE),
    runbook=["GatewayBusDown"],
)
panel(
    "Probe age",
    "Seconds since each node received its own probe through Redis, and probes that did not arrive within 2 minutes.",
    (select("gateway_bus_probe_age_seconds"), INSTANCE),
    (increase("gateway_bus_probe_timeouts_total", "2m", "instance"), "{{instance}} lost"),
    above=2,
    runbook=["GatewayProbeLate"],
)
panel(
    "Entries received",
    "Log entries received from Redis per second, by result. After a gap the log is read.",
    (rate("gateway_bus_entries_received_total", "result"), "{{result}}"),
    unit="ops",
)
panel(
    "Log repairs",
    "Reads of a log because entries had not been received, per second, by result. Clients notice only a reset.",
    (rate("gateway_log_repairs_total", "result"), "{{result}}"),
    unit="ops",
    runbook=["GatewayLogRepairs", "GatewayContinuityLost"],
)
panel(
    "Logs compared and restored",
    "Logs compared with a Redis server that may have lost entries, within 2 minutes, by result.",
    (increase("gateway_log_restores_total", "2m", "result"), "{{result}}"),
    runbook=["GatewayLogRestored", "GatewayLogConflict"],
)
panel(
    "Recovery rounds",
    "Agreements of the nodes on a Redis server within 2 minutes. Incomplete ones may begin new epochs.",
    (increase("gateway_recovery_rounds_total", "2m", "complete"), "complete: {{complete}}"),
)
panel(
    "Messages appended again",
    "Per second: republished to another server, appended again after a failover, and given up.",
    (rate("gateway_republished_total"), "republished"),
    (rate("gateway_reappended_messages_total"), "appended again"),
    (rate("gateway_unconfirmed_publishes_dropped_total"), "unconfirmed dropped"),
    unit="ops",
)
panel(
    "Slow consumers and overflows",
    "Per second: full outboxes of members, and entries dropped because the mailbox of a shard was full. Both continue "
    "from the log.",
    (rate("gateway_slow_consumers_total", "instance"), INSTANCE),
    (rate("gateway_mailbox_overflows_total", "instance"), "{{instance}} mailbox"),
    unit="ops",
    runbook=["GatewaySlowConsumers"],
)
panel(
    "Connections to Redis lost",
    "Connections to Redis that were lost and reopened, per second.",
    (rate("gateway_bus_reconnects_total", "instance"), INSTANCE),
    unit="ops",
)
panel(
    "Resumes",
    "Joins that resume from a position, per second, by the source of the missed entries: the memory of the gateway "
    "(ring) or Redis (log). Sticky routing increases the share of the ring.",
    (rate("gateway_resumes_total", "source"), "{{source}}"),
    unit="ops",
)
panel(
    "Entries in memory",
    "Memory for the newest entries of each room, kept for members that reconnect.",
    (select("gateway_ring_bytes"), INSTANCE),
    unit="bytes",
)
panel(
    "Message ids in memory",
    "Memory for the ids within `dedup.window`, and groups of ids forgotten before its end within 2 minutes.",
    (select("gateway_dedup_ids_bytes"), INSTANCE),
    (increase("gateway_dedup_id_buckets_dropped_total", "2m", "instance"), "{{instance}} groups forgotten"),
    unit="bytes",
)

row("Redis")
panel(
    "Redis round trip",
    "Time of a PING to Redis, p50 and p99 of each node. Is Redis the bottleneck? It is if this rises on all nodes.",
    (quantile(0.5, "gateway_redis_round_trip_seconds", "instance"), "{{instance}} p50"),
    (quantile(0.99, "gateway_redis_round_trip_seconds", "instance"), "{{instance}} p99"),
    unit="s",
    log=True,
    runbook=["GatewayPublishSlow", "GatewayProbeLate"],
)
panel(
    "Redis memory",
    "Memory of the Redis server with the least left. Above 80 % (`cluster.memory_watermark`) no new state is stored.",
    (f"max({select('gateway_redis_memory_used_bytes')})", "used"),
    (f"max({select('gateway_redis_memory_max_bytes')})", "max"),
    unit="bytes",
    runbook=["GatewayRedisMemory", "GatewayRedisMemoryRising"],
)
panel(
    "Memory pressure and eviction",
    "Pressure 1: new state is rejected, 2: logs are cut short. Eviction 1: Redis evicts keys, and acknowledged "
    "messages with them.",
    (f"max({select('gateway_redis_memory_pressure')})", "pressure"),
    (f"max({select('gateway_redis_evicts_keys')})", "eviction"),
    above=1,
    runbook=["GatewayRedisMemory", "GatewayRedisEvicts"],
)
panel(
    "Rejected by a storage limit",
    "Requests rejected because they would store more than a limit of docs/limits.md, per second, by limit.",
    (rate("gateway_storage_rejections_total", "reason"), "{{reason}}"),
    unit="reqps",
)
panel(
    "Persistence",
    "1 if Redis persists its data, 0 if not, -1 if it does not say.",
    (f"min by (kind) ({select('gateway_redis_persistence')})", "{{kind}}"),
    signed=True,
    runbook=["GatewayRedisNotPersistent"],
)
panel(
    "Replicas and their lag",
    "Replicas of the Redis server that has the fewest, and how far the last one is behind, in seconds and bytes.",
    (f"min({select('gateway_redis_replicas')})", "replicas"),
    (f"max({select('gateway_redis_replica_lag_seconds')})", "lag in s"),
    (f"max({select('gateway_redis_replica_lag_bytes')})", "lag in bytes"),
    runbook=["GatewayRedisReplicaLag"],
)
panel(
    "Foreign values",
    "Values that no gateway wrote, read within 2 minutes, by kind.",
    (increase("gateway_redis_invalid_values_total", "2m", "kind"), "{{kind}}"),
    runbook=["GatewayRedisInvalidValues"],
)
panel("Redis version", "Versions of the Redis servers.", select("gateway_redis_info"), kind="table")

row("Archive")
panel(
    "Waiting for the archive",
    "Messages that wait for the database, and rooms whose messages have no space in Redis.",
    (f"max({select('gateway_archive_lag_entries')})", "messages"),
    (f"max({select('gateway_archive_rooms_behind')})", "rooms behind"),
    runbook=["GatewayArchiveBehind"],
)
panel(
    "Age of the oldest",
    "How long the oldest message has waited for the archive.",
    f"max({select('gateway_archive_oldest_seconds')})",
    unit="s",
    runbook=["GatewayArchiveBehind"],
)
panel(
    "Archive reached",
    "1 if a gateway reaches the database of the archive, 0 if not, -1 if it has none.",
    (select("gateway_archive_up"), INSTANCE),
    signed=True,
    runbook=["GatewayArchiveDown"],
)
panel(
    "Archived per second",
    "Messages that gateways have copied to the archive, and those that it rejected or that no gateway wrote.",
    (rate("gateway_archive_entries_total", "result"), "{{result}}"),
    unit="ops",
)
panel(
    "Write p50 and p99",
    "Time until the database has committed a batch of messages, with the time that it is away.",
    (quantile(0.5, "gateway_archive_write_seconds"), "p50"),
    (quantile(0.99, "gateway_archive_write_seconds"), "p99"),
    unit="s",
    log=True,
)

row("Cost")
panel(
    "CPU per delivery",
    "User and system time of all gateways, divided by deliveries. High while little is delivered.",
    f"{rate('process_cpu_seconds_total')} / ({rate('gateway_deliveries_total')} > 0)",
    unit="s",
)
panel("CPU", "Cores that each gateway uses.", (rate("process_cpu_seconds_total", "instance"), INSTANCE))
panel(
    "Memory per connection",
    "Resident memory of all gateways, divided by connections. With few connections, the base memory of the processes "
    "dominates.",
    (
        f"sum({select('process_resident_memory_bytes')}) / (sum({select('gateway_connections')}) > 0)",
        "per connection",
    ),
    (select("process_resident_memory_bytes"), INSTANCE),
    unit="bytes",
    log=True,
)
panel(
    "Descriptors",
    "Open file descriptors of each gateway, one per client. At its limit a gateway rejects clients.",
    (select("process_open_fds"), INSTANCE),
    (f"min({select('process_max_fds')})", "limit"),
    log=True,
    runbook=["GatewayDescriptorsLow"],
)

data_source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "regex": ""}
data_source |= {"refresh": 1, "includeAll": False, "multi": False, "options": [], "hide": 0}
data_source["current"] = {"selected": True, "text": "Prometheus", "value": "prometheus"}
runbook = {"name": "runbook", "label": "Runbook", "type": "constant", "query": RUNBOOK, "hide": 2, "options": []}
runbook |= {"skipUrlSync": True, "current": {"selected": True, "text": RUNBOOK, "value": RUNBOOK}}
link = {"title": "Runbook", "type": "link", "url": "${runbook}", "icon": "doc", "targetBlank": True, "tags": []}
link |= {"asDropdown": False, "includeVars": False, "keepTime": False}
link["tooltip"] = "An entry per alert: meaning, what to look at, what to do"
annotation = {"datasource": DATA_SOURCE, "enable": True, "name": "Alerts", "iconColor": "red"}
annotation |= {"expr": 'ALERTS{alertstate="firing",cluster=~"$cluster"}', "titleFormat": "{{alertname}}"}
annotation["textFormat"] = "{{instance}}{{node}}"
dashboard = {
    "uid": "skein-gateway",
    "title": "Skein gateways",
    "tags": ["skein"],
    "editable": False,
    "schemaVersion": 41,
    "version": 2,
    "timezone": "browser",
    "refresh": "5s",
    "graphTooltip": 1,
    "time": {"from": "now-15m", "to": "now"},
    "timepicker": {},
    "links": [link],
    "annotations": {"list": [annotation]},
    "templating": {
        "list": [
            data_source,
            variable("job", "Job", "label_values(gateway_connections, job)"),
            variable("cluster", "Cluster", 'label_values(gateway_connections{job=~"$job"}, cluster)'),
            variable(
                "instance", "Gateway", 'label_values(gateway_connections{job=~"$job",cluster=~"$cluster"}, instance)'
            ),
            runbook,
        ]
    },
    "panels": panels,
}
print(json.dumps(dashboard, indent=2, ensure_ascii=False))
