"""Renders the Helm chart with Helm's own engine and checks every object against the schemas of Kubernetes.

deploy/stack-tools.sh installs what it imports. ServiceMonitor is a custom resource, whose schema is not among them.
"""

import copy
import re
from pathlib import Path

import helm_python as helm
import kubernetes_validate
import yaml

CHART = Path(__file__).parent / "skein"
# The oldest version that the chart allows and supported ones since.
KUBERNETES = ["1.27", "1.31", "1.35"]
CUSTOM = {"ServiceMonitor"}

MINIMAL = {"redis": {"url": "redis://redis:6379/"}}
FULL = {
    "image": {"repository": "registry.example.org/skein/gateway", "tag": "1.2.3"},
    "imagePullSecrets": [{"name": "registry"}],
    "redis": {"existingSecret": "redis", "secretKey": "url"},
    "config": {"auth.mode": "jwt", "limits.connections_per_ip": 1000000, "api.docs": False},
    "secretConfig": {"auth.jwt_secret": {"secret": "skein", "key": "jwt-secret"}},
    "secretFiles": [{"name": "redis-tls"}],
    "trustedProxies": ["10.0.0.7/32", "10.0.0.8/32"],
    "drain": {"preStopSeconds": 10, "delaySeconds": 2, "windowSeconds": 60},
    "service": {"type": "LoadBalancer", "annotations": {"a": "b"}},
    "ingress": {"enabled": True, "className": "nginx", "host": "chat.example.org", "tlsSecret": "tls"},
    "autoscaling": {"enabled": True, "cpuPercent": 70},
    "networkPolicy": {"clients": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "metrics": [{"podSelector": {}}]},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "podAnnotations": {"a": "b"},
    "podLabels": {"team": "chat"},
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "tolerations": [{"key": "dedicated", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "priorityClassName": "high",
}


def render(chart, values):
    """The objects by kind and name."""
    objects = {}
    for path, text in chart.render(values, name="demo", namespace="chat").items():
        if not path.endswith(".yaml"):
            continue
        for item in yaml.safe_load_all(text):
            if item is not None:
                key = (item["kind"], item["metadata"]["name"])
                assert key not in objects, key
                objects[key] = item
    return objects


def rejected(chart, values, reason):
    try:
        chart.validate_schema(values)
        chart.render(values, name="demo", namespace="chat")
    except helm.HelmError as error:
        assert re.search(reason, str(error)), error
        return
    raise AssertionError(f"accepted: {values}")


def check_objects(objects):
    for (kind, name), item in objects.items():
        if kind in CUSTOM:
            continue
        for version in KUBERNETES:
            kubernetes_validate.validate(item, version, strict=True)
    selector = objects["Deployment", "demo-skein"]["spec"]["selector"]["matchLabels"]
    pod = objects["Deployment", "demo-skein"]["spec"]["template"]
    for (kind, name), item in objects.items():
        spec = item.get("spec", {})
        for one in [spec.get("selector", {}), spec.get("podSelector", {})]:
            labels = one.get("matchLabels", one if kind == "Service" else {})
            if kind == "ServiceMonitor":
                target = objects["Service", "demo-skein-nodes"]["metadata"]["labels"]
            else:
                target = pod["metadata"]["labels"]
            assert labels.items() <= target.items(), (kind, name, labels)
    assert selector.items() <= pod["metadata"]["labels"].items()

    container = pod["spec"]["containers"][0]
    assert pod["spec"]["securityContext"]["runAsNonRoot"] and pod["spec"]["securityContext"]["runAsUser"] == 10001
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not pod["spec"]["automountServiceAccountToken"]
    assert container["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "admin"}
    assert container["livenessProbe"]["httpGet"] == {"path": "/health", "port": "admin"}
    # The pod outlives what the gateway may take, as docs/operations.md has it.
    config = objects["ConfigMap", "demo-skein"]["data"]
    drain = sum(int(config[f"GATEWAY__DRAIN__{part}"].removesuffix("s")) for part in ["DELAY", "WINDOW"])
    pre_stop = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["spec"]["terminationGracePeriodSeconds"] == pre_stop + drain + 45
    # Clients never reach the admin port.
    ports = [port["targetPort"] for port in objects["Service", "demo-skein"]["spec"]["ports"]]
    assert ports == ["http"], ports
    from_anywhere = [
        port["port"]
        for rule in objects["NetworkPolicy", "demo-skein"]["spec"]["ingress"]
        if not rule.get("from")
        for port in rule["ports"]
    ]
    assert 9100 not in from_anywhere


def main():
    found = helm.lint(str(CHART))
    assert not found["errors"] and all(one["severity"] <= 1 for one in found["messages"]), found
    with helm.Chart.load(str(CHART)) as chart:
        kinds = {}
        for name, values in [("minimal", MINIMAL), ("full", FULL)]:
            chart.validate_schema(values)
            objects = render(chart, values)
            check_objects(objects)
            kinds[name] = sorted(f"{kind}" for kind, _ in objects)
            print(f"{name}: {len(objects)} objects: {' '.join(kinds[name])}")
        full = render(chart, FULL)
        scaler = full["HorizontalPodAutoscaler", "demo-skein"]["spec"]
        assert scaler["metrics"][0]["pods"]["metric"]["name"] == "gateway_connections"
        assert "replicas" not in full["Deployment", "demo-skein"]["spec"]
        config = full["ConfigMap", "demo-skein"]["data"]
        assert config["GATEWAY__LIMITS__CONNECTIONS_PER_IP"] == "1000000", config
        assert config["GATEWAY__SERVER__TRUSTED_PROXIES"] == "10.0.0.7/32,10.0.0.8/32"
        text = yaml.safe_dump(full["Deployment", "demo-skein"])
        assert "jwt-secret" in text and "/run/secrets/redis-tls" in text

        rejected(chart, {}, "redis.url or redis.existingSecret")
        rejected(chart, {**MINIMAL, "config": {"drain.window": "60s"}}, "drain.window")
        rejected(chart, {**MINIMAL, "replica": 3}, "replica")
        wrong = copy.deepcopy(MINIMAL)
        wrong["redis"]["url"] = "http://redis/"
        rejected(chart, wrong, "url")
    print(f"Helm {helm.helm_sdk_version()}, Kubernetes {' '.join(KUBERNETES)}: the chart is valid")


main()
