"""`make settings`: writes the alerts of deploy/observability into a PrometheusRule: Kustomize embeds no file."""

from pathlib import Path
from textwrap import indent
from typing import Final

_FOLDER: Final = Path(__file__).parent
_HEAD: Final = """\
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: durable-llm
spec:
"""

if __name__ == "__main__":
    alerts = (_FOLDER / "observability" / "alerts.yml").read_text()
    rule = _FOLDER / "kubernetes" / "components" / "monitoring" / "prometheus-rule.yaml"
    rule.write_text(_HEAD + indent(alerts, "  "))
