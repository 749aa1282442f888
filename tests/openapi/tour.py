"""Calls each operation of the REST API once, so that it does what it is for, and holds the answer against the description.

    tour.py http://127.0.0.1:6001 openapi.json

The node has users 42 and 43 with their phones on gw-1:7000, and 44 with a laptop on gw-2:7000. The description is written to the
file.
"""

import json
import sys
import time

import requests
import schemathesis
from schemathesis.checks import CHECKS

NAMES = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
USER = "/api/v1/users/{user_id}"
GATEWAY = "/api/v1/gateways/{gateway_addr}"
WHY = {"reason": "tour"}
PATIENCE_S = 90


def steps(epoch):
    """Method, path, what stands in the path, query, body: in an order in which each succeeds."""
    gw1, gw2 = {"gateway_addr": "gw-1:7000"}, {"gateway_addr": "gw-2:7000"}
    user = lambda number, **more: {"user_id": str(number), **more}
    yield "GET", "/api", {}, {}, None
    yield "GET", "/api/v1/openapi.json", {}, {}, None
    for by in "gateway", "region", "platform", "status":
        yield "GET", "/api/v1/counts", {}, {"by": by}, None
    yield "GET", "/api/v1/users", {}, {"gateway": "gw-1:7000", "limit": 1}, None
    yield "GET", USER, user(42), {}, None
    yield "GET", USER, user(7), {"this_node_only": "true"}, None
    yield "PUT", USER + "/status", user(42), {}, {"status": "busy", "text": "in a meeting", "expire_after_s": 3600}
    yield "POST", USER + "/deliver", user(42), {}, {"message": "hi", "ack_timeout_ms": 5000}
    yield "POST", USER + "/deliver", user(45), {}, {"message": "later", "message_type": "t", "store_offline": True}
    yield "GET", USER + "/inbox", user(45), {}, None
    yield "GET", USER + "/history", user(42), {"include_hidden": "true"}, None
    yield "GET", USER + "/online-time", user(42), {}, None
    yield "POST", "/api/v1/allocate", {}, {}, {"user_id": "7", "count": 2, "platform": "ios"}
    yield "POST", "/api/v1/policy/preview", {}, {}, {"max_devices": 1}
    yield "GET", "/api/v1/gateways", {}, {"prefix": "gw-", "state": "alive"}, None
    yield "PUT", "/api/v1/hold", {}, {}, {"for_ms": 600000, **WHY}
    yield "GET", "/api/v1/hold", {}, {}, None
    yield "GET", "/api/v1/gateways", {}, {}, None
    yield "POST", "/api/v1/hold/confirm", {}, {"dry_run": "true"}, WHY
    yield "POST", "/api/v1/hold/confirm", {}, {}, WHY
    yield "DELETE", "/api/v1/hold", {}, WHY, None
    yield "POST", "/api/v1/gateways/rebalance", {}, {"dry_run": "true"}, WHY
    yield "POST", GATEWAY + "/drain", gw2, {"dry_run": "true"}, WHY
    yield "POST", GATEWAY + "/drain", gw2, {}, {"wait_s": 3600, "to": ["gw-1:7000"], **WHY}
    yield "GET", "/api/v1/drains", {}, {"active_only": "true"}, None
    yield "GET", GATEWAY, gw2, {}, None
    yield "DELETE", GATEWAY + "/drain", gw2, {}, None
    yield "POST", USER + "/migrate", user(42), {"dry_run": "true"}, {}
    yield "DELETE", USER + "/devices/{device_id}", user(43, device_id="phone"), WHY, None
    yield "DELETE", USER + "/devices", user(44), {"device_id": "laptop", **WHY}, None
    yield "PUT", USER + "/ban", user(44), {}, {"ban_for_s": 3600, **WHY}
    yield "DELETE", USER + "/ban", user(44), WHY, None
    yield "DELETE", USER + "/routes", user(42), {"dry_run": "true", **WHY}, None
    yield "DELETE", "/api/v1/lives/{epoch}", {"epoch": epoch}, WHY, None
    yield "DELETE", GATEWAY, gw1, WHY, None
    yield "GET", GATEWAY, gw1, {}, None
    yield "GET", "/api/v1/audit", {}, {"action": "PurgeGateways"}, None
    yield "GET", "/api/v1/summary", {}, {}, None
    yield "GET", "/api/v1/nodes", {}, {}, None
    yield "GET", "/api/v1/nodes/{node_id}/streams", {"node_id": "node-1"}, {"sort": "queue"}, None
    yield "GET", "/api/v1/metrics", {}, {}, None
    yield "GET", "/api/v1/config", {}, {"node": "node-1"}, None
    yield "GET", "/api/v1/config/diff", {}, {}, None
    yield "GET", "/api/v1/doctor", {}, {}, None
    yield "GET", "/api/v1/events", {}, {"follow": "false", "last": 10}, None


def wait_for(what, done):
    began = time.monotonic()
    while not done():
        assert time.monotonic() - began < PATIENCE_S, f"not in time: {what}"
        time.sleep(0.2)


def main(url, file):
    ask = lambda path: requests.get(url + path, timeout=10)
    wait_for("three users", lambda: len(ask("/api/v1/users").json()["items"]) == 3)
    wait_for("a census", lambda: ask("/api/v1/counts").status_code == 200)
    epoch = ask("/api/v1/gateways/gw-2:7000").json()["gateway"]["epoch"]
    document = ask("/api/v1/openapi.json").json()
    with open(file, "w", encoding="utf-8") as out:
        json.dump(document, out)
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=url)
    checks = CHECKS.get_by_names(NAMES)
    left = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    for method, path, path_parameters, query, body in steps(epoch):
        more = {} if body is None else {"body": body, "media_type": "application/json"}
        case = schema[path][method].Case(path_parameters=path_parameters, query=query, **more)
        answer = case.call(base_url=url)
        assert answer.status_code == 200, f"{method} {path}: {answer.status_code} {answer.text}"
        case.validate_response(answer, checks=checks)
        left.discard((method, path))
    assert not left, f"not called: {sorted(left)}"


main(*sys.argv[1:])
