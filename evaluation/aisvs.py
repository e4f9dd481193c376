"""Which requirements of OWASP AISVS 1.0, chapter C11, a robustness report answers.

The chapter as it was published in June 2026. Its drafts also asked for certified figures per version, adaptive attacks,
audits after quantisation and the false-alarm rates of detectors, under numbers that now mean something else; a report
has these figures, but no requirement of 1.0 to put them under.
"""

from collections.abc import Mapping
from typing import Any

from evaluation.shares import percent

TITLE = "Requirements of OWASP AISVS 1.0, chapter C11 (Adversarial Robustness), that these figures answer:"


def answers(content: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Identifier, what it asks for, and the figures of a report (`evaluation.robustness.summarise`) that answer it.

    Only what was measured on the bundle as it is served; nothing where that was not.
    """
    row = next((name for name in ("server", "served") if name in content["accuracy"]), None)
    if row is None:
        return []
    rows, worst = [], content["worst"]
    attacks = [column for column, knows in content["knows"].items() if knows and column in content["accuracy"][row]]
    if attacks:
        names = "; ".join(content["threats"][column] for column in attacks)
        said = f"{percent(worst[row])} withstand all of: {names}" if row in worst else f"accuracy under: {names}"
        rows.append(("v1.0-C11.1.3", "evaluation against known attack techniques", said))
    if row in worst and "none" in worst:
        said = f"worst of all attacks: {percent(worst[row])}, without the defence {percent(worst['none'])}"
        rows.append(("v1.0-C11.1.4", "hardening against adversarial inputs", said))
    found = {
        name: entry["found"]["0.01"] for name, entry in content["detection"].get(row, {}).items() if "found" in entry
    }
    if found:
        said = "; ".join(f"{content['threats'][name]} {percent(entry)}" for name, entry in found.items())
        said = f"found by the attack score at 1 % false alarms: {said}"
        rows.append(("v1.0-C11.4.1", "detection of anomalous inputs before they are acted on", said))
    return rows
