"""The Grafana dashboard shows metrics that exist."""

from __future__ import annotations

import json
import re

from tests.unit.test_layout import ROOT

DASHBOARD = ROOT / "vllm_steer" / "serving" / "grafana.json"


def test_every_metric_of_the_dashboard_exists_and_every_metric_is_shown() -> None:
    from prometheus_client.metrics import MetricWrapperBase

    from vllm_steer.serving import metrics

    kept = [m for m in vars(metrics).values() if isinstance(m, MetricWrapperBase)]
    existing = {family.name: family.type for metric in kept for family in metric.collect()}
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    shown = set()
    for name, suffix in re.findall(r"(steering:\w+?)(_total|_bucket)?\b", " ".join(expressions)):
        kind = {"_total": "counter", "_bucket": "histogram", "": "gauge"}[suffix]
        assert existing.get(name) == kind, name + suffix
        shown.add(name)
    assert shown == set(existing)
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)
