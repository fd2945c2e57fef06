"""What was run: everything of the run's header and environment that a reader may want to check or repeat."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from robustknn.evaluation import RunDirectory
from robustknn.reports.words import norm, radius, visible

Pairs = list[tuple[str, str]]
_MOST_CLASSES = 20


def setup_of(run: RunDirectory) -> dict[str, Any]:
    """Lists of (term, value), the attacks with all parameters, and the voters; texts as they are, for the template."""
    plan, environment = run.header["plan"], run.environment
    return {
        "threat": _threat(plan),
        "data": _data(plan),
        "attacks": [
            {"name": n, "transfer": plan["attacks"][n]["transfer"], "parameters": list(_flat(plan["attacks"][n]))}
            for n in plan["attack_names"]
        ],
        "classifiers": [{"name": n, **plan["classifiers"][n]} for n in plan["classifier_names"]],
        "environment": [
            *((k, str(environment[k])) for k in ("device", "machine", "system", "threads") if k in environment),
            *((str(k), str(v)) for k, v in environment.get("versions", {}).items()),
        ],
        "command": environment.get("command", ""),
        "identity": [*run.header["identity"].items(), ("all of it", run.key)],
    }


def _threat(plan: Mapping[str, Any]) -> Pairs:
    threat = plan["threat"]
    low_high = threat["bounds"]
    pairs = [
        ("norm", norm(threat)),
        ("eps of the tables", _radius(threat["eps"], low_high)),
        ("all eps", ", ".join(_radius(e, low_high) for e in plan["eps"])),
        ("bounds of the inputs", "none" if low_high is None else f"{low_high[0]:g} to {low_high[1]:g}"),
        ("goal", "any wrong class"),
    ]
    if threat["norm"] == "l1":
        pairs.append(("coordinates an L1 step moves", f"{threat['l1_fraction']:g} of all"))
    return pairs


def _radius(eps: float, bounds: Any) -> str:
    text = radius(eps, bounds)
    return f"{text} ({eps:.4f})" if "/" in text else text


def _data(plan: Mapping[str, Any]) -> Pairs:
    names = plan["class_names"] or []
    pairs = [(str(k), _value(v)) for k, v in plan["describe"].items()]
    pairs += [
        ("samples", f"{plan['samples']:,}"),
        ("seed", str(plan["seed"])),
        ("kept as examples", f"the first {min(plan['examples'], plan['samples']):,}"),
        ("used for the controls", f"the first {min(plan['controls'], plan['samples']):,}"),
    ]
    if names:
        shown = ", ".join(visible(n, 24) for n in names[:_MOST_CLASSES])
        more = f" … ({len(names)} in all)" if len(names) > _MOST_CLASSES else ""
        pairs.append(("class names", shown + more))
    return pairs


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested parameters by dotted names: `objective.kind`."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif key != "transfer" or prefix:
            yield prefix + str(key), _value(value)


def _value(value: Any) -> str:
    if value is None:
        return "not set"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
