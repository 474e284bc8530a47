"""Each law, by texts that break it: `// expected-error: message` stands beside the bad line.

In the manner of MLIR's verify-diagnostics. A comment of its own line expects an error without a
place in the text. `// law: name` says which law a text is about; every law has one.
"""

import re
from collections import Counter
from pathlib import Path

import pytest

from sagellm_ir.graph import IRGraph
from sagellm_ir.text import parse_graph
from sagellm_ir.verify import (
    VerifyError,
    copies,
    declarations,
    schedule,
    service,
    sharing,
    spans,
    structure,
    verify,
)

CASES = [
    pytest.param(case, id=f"{file.stem}-{case.split('law: ')[1].split()[0]}")
    for file in sorted((Path(__file__).parent / "laws").glob("*.ir"))
    for case in file.read_text(encoding="utf-8").split("// -----\n")
]
LAWS = (
    *declarations.LAWS,
    *declarations.REQUEST_LAWS,
    *structure.LAWS,
    *spans.LAWS,
    *sharing.LAWS,
    *copies.LAWS,
    *service.LAWS,
    *schedule.STAGE_LAWS,
    *schedule.SCHEDULE_LAWS,
)


@pytest.mark.parametrize("text", CASES)
def test_law(text: str) -> None:
    expected = Counter(
        (0 if line.startswith("//") else number, message.strip())
        for number, line in enumerate(text.splitlines(), 1)
        for message in re.split(r"// expected-error: ", line)[1:]
    )
    with pytest.raises(VerifyError) as caught:
        verify(parse_graph(text))
    found = Counter(
        (diagnostic.loc.line if diagnostic.loc else 0, diagnostic.message)
        for diagnostic in caught.value.diagnostics
    )
    assert found == expected


def test_every_law_has_a_text() -> None:
    tested = {name for case in CASES for name in re.findall("// law: (.*)", str(case.values[0]))}
    assert tested == {law.__name__ for law in LAWS} - {"known_stage"}


def test_known_stage() -> None:  # a text with an unknown stage does not parse
    with pytest.raises(VerifyError, match="unknown stage 'bilt'\nhelp: did you mean 'built'"):
        verify(IRGraph(stage="bilt"))
