"""Unified diffs, applied exactly: every context and removed line must be where the diff says.

No fuzz and no offsets: the files a diff is applied to are known by their hash. Written here
because neither `patch` nor `git` need be on a user's machine, and because `git apply` skips files
silently when it runs inside another repository (a site-packages folder often is).
"""

import re
from collections.abc import Iterable, Mapping

from attrs import evolve, frozen

__all__ = ["FileDiff", "Hunk", "PatchMismatch", "apply_diffs", "parse_diff"]

_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


class PatchMismatch(Exception):
    """A diff is malformed, or a file is not what a diff expects."""


@frozen
class Hunk:
    """Lines `[at, at + len(old))` of a file, from 0, become `new`. `new_at` is `at` of the reverse."""

    at: int
    new_at: int
    old: tuple[str, ...]
    new: tuple[str, ...]

    def reversed(self) -> "Hunk":
        """The hunk that undoes this one."""
        return Hunk(self.new_at, self.at, self.new, self.old)


@frozen
class FileDiff:
    """What a diff does to one file. A file that is made, or removed, has one hunk."""

    path: str
    hunks: tuple[Hunk, ...]
    makes: bool = False
    removes: bool = False

    def reversed(self) -> "FileDiff":
        """The diff that undoes this one."""
        hunks = tuple(hunk.reversed() for hunk in self.hunks)
        return evolve(self, hunks=hunks, makes=self.removes, removes=self.makes)

    def apply(self, text: str | None) -> str | None:
        """The file's new text; None stands for a file that is not there."""
        if (text is None) != self.makes:
            raise PatchMismatch(f"{self.path} {'is missing' if text is None else 'exists already'}")
        lines = (text or "").splitlines(keepends=True)
        out: list[str] = []
        done = 0
        for hunk in self.hunks:
            end = hunk.at + len(hunk.old)
            if hunk.at < done or tuple(lines[hunk.at : end]) != hunk.old:
                raise PatchMismatch(f"{self.path}:{hunk.at + 1} is not what the patch expects")
            out += lines[done : hunk.at]
            out += hunk.new
            done = end
        out += lines[done:]
        return None if self.removes else "".join(out)


def parse_diff(text: str) -> tuple[FileDiff, ...]:
    """The file diffs of a patch; text before the first `---` line is its description.

    Raises:
        PatchMismatch: the text is not a unified diff.
    """
    lines = text.splitlines(keepends=True)
    diffs = []
    at = 0
    while at < len(lines):
        if not lines[at].startswith("--- "):
            at += 1
            continue
        if at + 1 == len(lines) or not lines[at + 1].startswith("+++ "):
            raise PatchMismatch(f"line {at + 1}: '---' without '+++'")
        old, new = (line[4:].rstrip("\n").split("\t")[0] for line in lines[at : at + 2])
        at += 2
        hunks = []
        while at < len(lines) and (match := _HUNK.match(lines[at])):
            hunk, at = _parse_hunk(lines, at + 1, match)
            hunks.append(hunk)
        path = _path(new if old == "/dev/null" else old)
        diffs.append(FileDiff(path, tuple(hunks), old == "/dev/null", new == "/dev/null"))
    if not diffs:
        raise PatchMismatch("there is no '---' line: this is not a unified diff")
    return tuple(diffs)


def _parse_hunk(lines: list[str], at: int, match: re.Match[str]) -> tuple[Hunk, int]:
    old_at, old_count, new_at, new_count = (
        1 if part is None else int(part) for part in match.groups()
    )
    old: list[str] = []
    new: list[str] = []
    while len(old) < old_count or len(new) < new_count:
        mark, body = (lines[at][:1], lines[at][1:]) if at < len(lines) else ("", "")
        if mark not in (" ", "-", "+"):
            raise PatchMismatch(f"line {at + 1}: the hunk is shorter than its header says")
        if mark != "+":
            old.append(body)
        if mark != "-":
            new.append(body)
        at += 1
    # A header counts from 1, and names the line before when its side is empty.
    hunk = Hunk(old_at - bool(old_count), new_at - bool(new_count), tuple(old), tuple(new))
    return hunk, at


def _path(name: str) -> str:
    path = name.partition("/")[2]
    if not path or path.startswith("/") or ".." in path.split("/"):
        raise PatchMismatch(f"{name!r} is no path inside the source tree")
    return path


def apply_diffs(
    files: Mapping[str, str | None], diffs: Iterable[FileDiff]
) -> dict[str, str | None]:
    """Apply diffs in order to `files` (None: not there); returns what they become.

    Raises:
        PatchMismatch: a file is not what a diff expects; nothing is changed.
    """
    out = dict(files)
    for diff in diffs:
        out[diff.path] = diff.apply(out.get(diff.path))
    return out
