"""Completion of `sage infer ...` in bash and zsh, where a host's parser has none of its own.

The shell asks `sagellm-ir`, which has the same commands and knows how to answer.
"""

import os
from pathlib import Path

from sagellm_ir.cli import shared

__all__ = ["SCRIPT", "complete", "install"]

SCRIPT = """\
_sage_completion() {
    local words count=$COMP_CWORD
    case "${COMP_WORDS[1]}" in
        infer) words="sagellm-ir ${COMP_WORDS[*]:2}"; count=$((COMP_CWORD - 1)) ;;
        llm|gateway) words="sagellm-ir ${COMP_WORDS[*]:1}" ;;
        *) return 0 ;;
    esac
    [ "$COMP_CWORD" -gt 1 ] || return 0
    local IFS=$'\\n'
    COMPREPLY=( $(env COMP_WORDS="$words" COMP_CWORD="$count" \\
        _SAGELLM_IR_COMPLETE=complete_bash sagellm-ir) )
}
complete -o default -F _sage_completion sage
"""
"""For bash, and for zsh after `bashcompinit`."""

_BEFORE = {"bash": "", "zsh": "autoload -Uz bashcompinit && bashcompinit && "}


def complete(words: list[str]) -> int | None:
    """The exit code of a call that asks for completion; None when it asks for something else."""
    if words[:1] == ["--show-completion"]:
        shared.emit(SCRIPT)
        return 0
    if words[:1] != ["--install-completion"]:
        return None
    shell = words[1] if len(words) > 1 else Path(os.environ.get("SHELL", "")).name
    if shell not in _BEFORE:
        shared.note(f"--install-completion: no completion for {shell!r}; bash or zsh")
        return 2
    install(shell, Path.home())
    return 0


def install(shell: str, home: Path) -> None:
    """Writes the script, and a line that reads it to the shell's start file, once."""
    script, start = home / ".bash_completions" / "sage.sh", home / f".{shell}rc"
    script.parent.mkdir(exist_ok=True)
    script.write_text(SCRIPT)
    line = f"{_BEFORE[shell]}source '{script}'\n"
    before = start.read_text() if start.exists() else ""
    if line not in before:
        start.write_text(before + ("" if before.endswith("\n") or not before else "\n") + line)
    shared.note(f"{start} reads the completion of `sage` now: open a new shell")
