"""Push of an exported folder to the Hugging Face hub, with its model card."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ivl.architecture.config import read_json
from ivl.export.model_card import CARD, hub_id, private_base, with_licence
from ivl.hub.push import Remote, licence_of, look_up, push_folder
from ivl.storage.files import write_text
from ivl.types import UserError, first_few, printable

REPORT = "export_report.json"
"""Report of an export, which stays here: it names folders of this machine"""


@dataclass(frozen=True)
class Push:
    """Push that was asked for."""

    remote: Remote
    replace: bool
    """Replace the files of a repository that holds others"""

    @classmethod
    def of(cls, name: str | None, private: bool, replace: bool) -> Push | None:
        """Return the push to a repository as it is now; None without a name. Raises UserError as `look_up`."""
        return None if name is None else cls(look_up(name, private), replace)

    def check_empty(self) -> None:
        """Raise UserError where the repository holds files that are not to be replaced."""
        if self.remote.digests and not self.replace:
            raise UserError(
                f"--push {self.remote.name}: exists already, with {first_few(sorted(self.remote.digests), 3)}; name "
                "another repository, or add --push_replace (its files are replaced in a new commit, the earlier "
                "commits stay)"
            )

    def push(self, folder: Path) -> None:
        """Push an exported folder, unless the repository holds just its files already.

        Raises UserError where the folder is no export, the repository holds other files, or the hub refuses.
        """
        remote = self.remote
        if not (folder / REPORT).is_file():
            raise UserError(
                f"--push {remote.name}: {folder} is no exported folder ({REPORT} is missing); give --run, --adapter or "
                "--base to export one"
            )
        report = read_json(folder / REPORT)
        _complete_card(folder, report, remote.name)
        if remote.digests and not remote.differing(folder, (REPORT,)):
            print(printable(f"{remote.url}: holds these files already, nothing to push"))
            return
        self.check_empty()
        again = ["python", "-m", "ivl", "export", "--out", str(folder), "--push", remote.name]
        again += ["--private"] * remote.private + ["--push_replace"] * self.replace
        url = push_folder(folder, remote, f"Export by {report['program']}", shlex.join(again), skipped=(REPORT,))
        print(printable(f"pushed to {remote.url} ({url})"))
        if text := private_base(folder):
            print(printable(f"  note: {text}"))


def _complete_card(folder: Path, report: dict[str, Any], name: str) -> None:
    """Write the repository's name into the card's commands, and the licence of the base where the card has none."""
    path = folder / CARD
    if not path.is_file():
        return
    before = card = path.read_text(encoding="utf-8")
    for command in report["commands"].values():
        card = card.replace(command.format(folder.name), command.format(name))
    card = card.replace(f"\n# {folder.name}\n", f"\n# {name.partition('/')[2]}\n")
    base = hub_id(report["base"])
    if base and with_licence(card, "unknown", base) != card and (licence := licence_of(base)):
        card = with_licence(card, licence, base)
    if card != before:
        write_text(path, card)
