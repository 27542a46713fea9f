"""An alert, or a panel, is one click away from what to do: a section of docs/runbook.md."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from deploy import runbook_links
from deploy.runbook_links import ALERTS, DASHBOARD
from tests.support.blocks import anchors
from tests.support.paths import ROOT

RUNBOOK = ROOT / "docs" / "runbook.md"


def panels() -> list[dict[str, Any]]:
    """Return the panels of the dashboard that show something."""
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def links_of_alerts() -> dict[str, str]:
    """Return where each alert leads."""
    groups = yaml.safe_load(ALERTS[0].read_text())["groups"]
    return {rule["alert"]: rule["annotations"]["runbook_url"] for group in groups for rule in group["rules"]}


def test_every_alert_leads_to_a_section_of_the_runbook() -> None:
    """Its annotation runbook_url is the address of the page and a heading that exists."""
    for alert, url in links_of_alerts().items():
        page, _, anchor = url.partition("#")
        assert page == runbook_links.address(), alert
        assert anchor in anchors(RUNBOOK), alert


def test_every_panel_leads_to_a_section_of_the_runbook() -> None:
    """The address of the page is a variable of the dashboard."""
    for panel in panels():
        (link,) = panel["links"]
        page, _, anchor = link["url"].partition("#")
        assert page == "${runbook}", panel["title"]
        assert anchor in anchors(RUNBOOK), panel["title"]


def test_every_symptom_of_the_runbook_is_seen_by_an_alert_or_a_panel() -> None:
    symptoms = RUNBOOK.read_text().partition("\n## Diagnose\n")[2].partition("\n## ")[0]
    headings = re.findall(r"^### (.+)$", symptoms, re.MULTILINE)
    described = {heading.lower().replace(" ", "-") for heading in headings}
    urls = [*links_of_alerts().values(), *(panel["links"][0]["url"] for panel in panels())]
    assert described <= {url.partition("#")[2] for url in urls}


def test_all_links_can_lead_elsewhere(tmp_path: Path) -> None:
    """And back: nothing else changes."""
    copies = [tmp_path / path.name for path in (*ALERTS, DASHBOARD)]
    for copy, path in zip(copies, (*ALERTS, DASHBOARD), strict=True):
        copy.write_text(path.read_text())
    runbook_links.lead_to("https://wiki.example/llm?page=1", *copies)
    before = runbook_links.address()
    for copy, path in zip(copies, (*ALERTS, DASHBOARD), strict=True):
        text = copy.read_text()
        assert before not in text
        assert text.replace("https://wiki.example/llm?page=1", before) == path.read_text()
