"""What a schema does not say of rendered manifests: that what is named is there, and that the pods are what they should be.

    python3 tests/kubernetes.py RENDERED [--known FILE]      writes the kinds that Kubernetes itself knows to FILE
"""

import sys
import tomllib

import yaml

KNOWN = {"v1", "apps/v1", "policy/v1", "networking.k8s.io/v1"}
GRACE_S = 10  # what the daemon promises, without drain_ms

wrong = []


def check(holds, what):
    if not holds:
        wrong.append(what)


def selects(selector, labels):
    return bool(selector) and all(labels.get(key) == value for key, value in selector.items())


def is_restricted(pod, container):
    outer, inner = pod["securityContext"], container["securityContext"]
    return (
        outer["runAsNonRoot"]
        and outer["runAsUser"] == 10001
        and outer["seccompProfile"]["type"] == "RuntimeDefault"
        and inner["allowPrivilegeEscalation"] is False
        and inner["readOnlyRootFilesystem"]
        and inner["capabilities"]["drop"] == ["ALL"]
    )


with open(sys.argv[1], encoding="utf-8") as file:
    documents = list(yaml.safe_load_all(file))
of_kind = lambda kind: [document for document in documents if document["kind"] == kind]
[nodes] = of_kind("StatefulSet")
spec, pod = nodes["spec"], nodes["spec"]["template"]["spec"]
labels = nodes["spec"]["template"]["metadata"]["labels"]
[container] = pod["containers"]
ports = {port["name"]: port["containerPort"] for port in container["ports"]}

services = {service["metadata"]["name"]: service["spec"] for service in of_kind("Service")}
check(spec["serviceName"] in services and services[spec["serviceName"]]["clusterIP"] == "None", "the nodes have no names")
for name, service in services.items():
    check(selects(service["selector"], labels), f"Service {name} selects no node")
    check(all(port["targetPort"] in ports for port in service["ports"]), f"Service {name} leads to no port")
check(selects(spec["selector"]["matchLabels"], labels), "the StatefulSet selects no pod of its own")
for budget in of_kind("PodDisruptionBudget"):
    check(selects(budget["spec"]["selector"].get("matchLabels"), labels), "the disruption budget selects no node")
policies = of_kind("NetworkPolicy")
check(policies, "no network policy")
for policy in policies:
    name, said = policy["metadata"]["name"], policy["spec"]
    check(selects(said["podSelector"].get("matchLabels"), labels), f"NetworkPolicy {name} selects no node")
    for rule in said["ingress"]:
        check(all(port["port"] in ports for port in rule["ports"]), f"NetworkPolicy {name} opens no port")
        opened = {port["port"] for port in rule["ports"]}
        peers = [peer["podSelector"]["matchLabels"] for peer in rule["from"]]
        check(peers and all(peers), f"NetworkPolicy {name} lets anybody in")
        check(all(len(peer) == 1 for peer in peers), f"NetworkPolicy {name} lets nobody in who has not all of: {peers}")
        check("admin" not in opened or all(not selects(peer, labels) for peer in peers), f"NetworkPolicy {name}: {opened}")
for monitor in of_kind("PodMonitor"):
    check(selects(monitor["spec"]["selector"]["matchLabels"], labels), "the PodMonitor selects no node")
    check(all(end["port"] in ports for end in monitor["spec"]["podMetricsEndpoints"]), "the PodMonitor scrapes no port")

maps = {document["metadata"]["name"]: document["data"] for document in of_kind("ConfigMap")}
volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
claims = {claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", [])}
mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
check(set(mounts.values()) == set(volumes) | claims, f"mounted: {mounts}, there are: {set(volumes) | claims}")
config = tomllib.loads(maps[volumes["config"]["configMap"]["name"]]["im-presence.toml"])
files = [value for section in config.values() for key, value in section.items() if key.endswith("_file")]
for path in files:
    directory = path.rpartition("/")[0]
    check("secret" in volumes.get(mounts.get(directory), {}), f"{path} is on no secret that is mounted")
for certificate in of_kind("Certificate"):
    secrets = {volume["secret"]["secretName"] for volume in volumes.values() if "secret" in volume}
    check(certificate["spec"]["secretName"] in secrets, "the certificate is not mounted")
is_embedded = "host" not in config["store"] and not config["store"].get("url", "").startswith("mysql:")
check(not is_embedded or mounts.get("/var/lib/im-presence") in claims, "the database is on no disk")
check(not is_embedded or spec["replicas"] == 1, "several nodes, and each has a database of its own")
drain_s = config["presence_service"]["drain_ms"] / 1000
check(pod["terminationGracePeriodSeconds"] >= drain_s + GRACE_S, "a node has no time to stop")
check(is_restricted(pod, container), "the pods may do more than they need")
check("cpu" not in container["resources"].get("limits", {}), "a limit of the CPU makes gateways look dead")

if "--known" in sys.argv:
    with open(sys.argv[sys.argv.index("--known") + 1], "w", encoding="utf-8") as file:
        yaml.safe_dump_all([document for document in documents if document["apiVersion"] in KNOWN], file)
if wrong:
    sys.exit("\n".join(f"{sys.argv[1]}: {what}" for what in wrong))
