"""What happened so far, one JSON line per event, so that a killed run goes on where it stopped.

The first line says the settings; a journal of other settings is refused. Events of a cell (dtype, batch, context):

    begun   a system starts (nothing after it: the process died in it)
    stopped the user or the machine stopped the run there: no fault of the system
    judged  its agreement and work
    block   one repetition: seconds to the first token and of the whole call, context switches, agreement of its text
    failed  it cannot run this cell: the reason
    served  requests over slots, here (dtype, slots, context): seconds until each was complete
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: Deaths of the process in one system of one cell before it is left out.
_DEATHS = 2


class Journal:
    """Append-only; the last line may be half written and is then dropped."""

    def __init__(self, path: Path, settings: dict[str, Any], fresh: bool = False) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.events: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh or not path.exists() or not self._read():
            path.write_text(json.dumps({"settings": self.settings}) + "\n", encoding="utf-8")

    def _read(self) -> bool:
        """Events of an earlier run; False where there is none."""
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        lines = [json.loads(line) for line in whole.splitlines()]
        if not lines:
            return False
        known = lines[0].get("settings", {})
        for key in dict.fromkeys([*known, *self.settings]):
            if known.get(key) != self.settings.get(key):
                raise SystemExit(
                    f"{self.path} was measured with {key} {known.get(key)!r}, wanted {self.settings.get(key)!r}: one table is "
                    "one run. Give another folder, or --fresh to start anew."
                )
        self.events = lines[1:]
        if whole != text:
            self.path.write_text(whole, encoding="utf-8")
        return True

    def add(self, cell: tuple[str, int, int], name: str, kind: str, **facts: Any) -> None:
        event = {"cell": list(cell), "name": name, "kind": kind} | facts
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event, allow_nan=False) + "\n")
        self.events.append(json.loads(json.dumps(event)))

    def of(self, cell: tuple[str, int, int], name: str, kind: str) -> list[dict[str, Any]]:
        """A system's events of one kind in a cell, in order."""
        return [e for e in self.events if e["cell"] == list(cell) and e["name"] == name and e["kind"] == kind]

    def died(self, cell: tuple[str, int, int], name: str) -> bool:
        """Whether the process died in this system often enough to leave it out."""
        begun = len(self.of(cell, name, "begun"))
        ended = sum(len(self.of(cell, name, kind)) for kind in ("stopped", "judged", "block", "served", "failed"))
        return begun - ended >= _DEATHS
