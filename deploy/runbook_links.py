"""`make runbook-links RUNBOOK_URL=…`: has alerts and panels lead to another copy of docs/runbook.md.

An alert's annotation runbook_url is the address of the page, `#` and a section. Prometheus has no variable for it.
"""

import json
import sys
from pathlib import Path
from typing import Final

_OBSERVABILITY: Final = Path(__file__).parent / "observability"
DASHBOARD: Final = _OBSERVABILITY / "grafana" / "dashboards" / "llm-jobs.json"
ALERTS: Final = (_OBSERVABILITY / "alerts.yml", _OBSERVABILITY / "alerts.test.yml")


def address() -> str:
    """Return where the links lead now: the value of the dashboard's variable."""
    variables = json.loads(DASHBOARD.read_text())["templating"]["list"]
    (query,) = (variable["query"] for variable in variables if variable["name"] == "runbook")
    return str(query)


def lead_to(url: str, *paths: Path) -> None:
    """Point the links in the files at a URL without a fragment."""
    before = address()
    for path in paths:
        text = path.read_text()
        # The quotes or the fragment are the address's end: it may be the beginning of another one.
        path.write_text(text.replace(f"{before}#", f"{url}#").replace(f'"{before}"', json.dumps(url)))


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].startswith(("https://", "http://")) or "#" in sys.argv[1]:
        sys.exit("usage: make runbook-links RUNBOOK_URL=https://…")
    lead_to(sys.argv[1], *ALERTS, DASHBOARD)
