#!/usr/bin/env python3
"""Checks im-presence.json: what Grafana would show wrongly, or not at all, without a word.

Needs promtool. Prints what is wrong, and exits with 1; prints nothing if all is well.
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile

COLUMNS = 24
ROWS = 6
VARIABLES = {"datasource", "job", "instance"}
# What Grafana puts in place of its own variables, and of ours.
STAND_INS = {"$__rate_interval": "5m", "$job": "im-presence", "$instance": "a"}


def overlaps(one, other):
    a, b = one["gridPos"], other["gridPos"]
    return a["x"] < b["x"] + b["w"] and b["x"] < a["x"] + a["w"] and a["y"] < b["y"] + b["h"] and b["y"] < a["y"] + a["h"]


def expressions(panels):
    """Name and PromQL of each target."""
    for panel in panels:
        for target in panel.get("targets", []):
            expression = target["expr"]
            for variable, stand_in in STAND_INS.items():
                expression = expression.replace(variable, stand_in)
            yield f"{panel['title']} {target['refId']}", expression, target["legendFormat"]


def promtool_says(panels):
    """promtool has no command for an expression alone: each becomes a rule that nobody loads."""
    rules = [{"record": f"x{n}", "expr": expression} for n, (_, expression, _) in enumerate(expressions(panels))]
    with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
        json.dump({"groups": [{"name": "dashboard", "rules": rules}]}, file)  # JSON is YAML
        file.flush()
        done = subprocess.run(["promtool", "check", "rules", file.name], capture_output=True, text=True)
    return [] if done.returncode == 0 else [done.stdout + done.stderr]


def lost_labels(panels):
    """Labels in a legend that the expression sums away are shown as nothing."""
    for name, expression, legend in expressions(panels):
        kept = [set(re.split(r",\s*", labels)) for labels in re.findall(r"\bby \(([^)]*)\)", expression)]
        for label in re.findall(r"{{(\w+)}}", legend):
            if kept and not any(label in labels for labels in kept):
                yield f"{name}: the legend uses {label}, which the expression sums away"


def problems(dashboard):
    panels = dashboard["panels"]
    if "__inputs" in dashboard or "id" in dashboard:
        yield "it must have no __inputs and no id: provisioned, they never bind"
    if dashboard["uid"] != "im-presence":
        yield f"the uid is an interface: {dashboard['uid']}"
    names = {variable["name"] for variable in dashboard["templating"]["list"]}
    if names != VARIABLES:
        yield f"variables: {names}"
    ids = [panel["id"] for panel in panels]
    if len(ids) != len(set(ids)):
        yield "two panels have one id"
    if sum(panel["type"] == "row" for panel in panels) != ROWS:
        yield f"there are not {ROWS} rows"
    for n, panel in enumerate(panels):
        place = panel["gridPos"]
        if place["x"] < 0 or place["w"] < 1 or place["x"] + place["w"] > COLUMNS:
            yield f"{panel['title']} is wider than the page"
        for other in panels[:n]:
            if overlaps(panel, other):
                yield f"{panel['title']} lies over {other['title']}"
        if panel["type"] != "row" and not panel.get("targets"):
            yield f"{panel['title']} shows nothing"
        for source in [panel, *panel.get("targets", [])]:
            if panel["type"] != "row" and source["datasource"]["uid"] != "${datasource}":
                yield f"{panel['title']} reads another data source than the one that is chosen"
    yield from lost_labels(panels)
    yield from promtool_says(panels)


def main():
    path = sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).with_name("im-presence.json")
    with open(path, encoding="utf-8") as file:
        found = list(problems(json.load(file)))
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
