"""Errors of the text: each says where, shows the line with a caret, and says what was expected."""

import pytest

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.text import parse_graph
from sagellm_ir.text.values import MAX_INTS

CASES = [
    # line inside the graph, column of the caret, message, help
    ("%a = prefil @r[0:4] : kv<4>", 6, "unknown node kind 'prefil'", "did you mean 'prefill'?"),
    ("%a b = prefill @r[0:4]", 4, "expected '=' after the name of the result, found 'b'", ""),
    ("%a = prefill @r[0:x]", 16, "expected two integers as in [0:16]", ""),
    ("%a = prefill @r(%b)", 16, "expected a span '[start:stop]' after the request, found '('", ""),
    ("%a = prefill(%b)", 6, "prefill covers a span of tokens, such as @r0[0:16]", ""),
    ("%a = allreduce @r[0:4]", 6, "allreduce has no span", ""),
    ("%a = prefill @r[0:4](%b %c)", 25, "expected ',' or ')'", ""),
    ("%a = prefill @r[0:4](%b, c)", 26, "expected a value such as %p", ""),
    ("%a = prefill @r[0:4](%b", 21, "'(' is not closed: expected ')' on the same line", ""),
    ("%a = prefill @r[0:4] {stp = 3}", 23, "unknown attribute 'stp'", "did you mean 'step'?"),
    ("%a = prefill @r[0:4] {step = 1, step = 2}", 33, "attribute 'step' is given twice", ""),
    (
        "%a = prefill @r[0:4] {step = x}",
        30,
        "step: expected an integer of at most 18 digits, found x",
        "",
    ),
    (
        '%a = prefill @r[0:4] {worker = "\\q"}',
        32,
        "not a valid string: Invalid \\escape: line 1 column 2 (char 1)",
        "",
    ),
    (
        "%a = prefill @r[0:4] {step 3}",
        28,
        "expected '=' after the attribute's name, found '3'",
        "",
    ),
    (
        "%a = prefill @r[0:4] {step = 3",
        22,
        "'{' is not closed: expected '}' on the same line",
        "",
    ),
    (
        "%a = prefill @r[0:4] : kv<5>",
        24,
        "expected the type kv<4> here, found kv<5>",
        "the result of this prefill has the type kv<4>",
    ),
    (
        "%a = prefill @r[0:4] after b",
        28,
        "expected a name such as %p after 'after', found 'b'",
        "",
    ),
    ("requst @r {prompt = 3}", 1, "unknown declaration 'requst'", "did you mean 'request'?"),
    ("request @r", 11, "this request lacks its attribute 'prompt'", "write {prompt = ...}"),
    ("request @r {prompt = 3, max_new = 0}", 9, "'max_new_tokens' must be > 0: 0", ""),
    ("request @r {prompt = 3, arrival = soon}", 35, "arrival: expected a number, found soon", ""),
    ("target @t {mixed = 1}", 20, "mixed: expected true or false, found 1", ""),
    ("steps [3y]", 8, "expected forwards x steps, such as 16x2, or forwards", ""),
    (
        "cache @host {blocks = [0:99999999999]}",
        24,
        f"a text may list at most {MAX_INTS} integers",
        "",
    ),
]


@pytest.mark.parametrize(("line", "column", "message", "help"), CASES)
def test_error(line: str, column: int, message: str, help: str) -> None:
    text = f"sagellm_ir 1\ngraph @g {{\n{line}\n}}\n"
    with pytest.raises(SageIRError) as caught:
        parse_graph(text, "a.ir")
    (found,) = caught.value.diagnostics
    assert (found.message, found.help) == (message, help)
    assert str(found.loc) == f"a.ir:3:{column}"
    source, carets = found.window.splitlines()
    assert source == f"   3 | {line}"
    assert carets.index("^") == column + 6


@pytest.mark.parametrize(
    ("text", "loc", "message"),
    [
        ("", "1:1", "expected 'sagellm_ir 1' as the first line"),
        ("graph @g {}", "1:1", "expected 'sagellm_ir 1' as the first line"),
        ("sagellm_ir 0\ngraph @g {}", "1:12", "version '0' of the text format cannot be read"),
        ("sagellm_ir 2\ngraph @g {}", "1:12", "version '2' of the text format cannot be read"),
        ("sagellm_ir 1\ngraph @g {\n", "2:11", "the text ends where a node such as"),
        ("sagellm_ir 1\ngraph @g {} }", "2:13", "expected the end of the text, found '}'"),
        ("sagellm_ir 1\ngraph @g {stage = bilt} {}", "2:10", "unknown stage 'bilt'"),
        ("sagellm_ir 1\ngraph @g {model @a model @b}", "2:20", "a graph has one model"),
        ("sagellm_ir 1\ngraph @g {steps [1] steps [1]}", "2:21", "a graph has one line of steps"),
    ],
)
def test_error_of_the_whole(text: str, loc: str, message: str) -> None:
    with pytest.raises(SageIRError) as caught:
        parse_graph(text)
    (found,) = caught.value.diagnostics
    assert str(found.loc) == f"<text>:{loc}"
    assert found.message.startswith(message)


def test_long_lines_are_cut_around_the_caret() -> None:
    blocks = ", ".join(map(str, range(0, 4000, 2)))
    text = (
        f"sagellm_ir 1\ngraph @g {{\nrequest @r {{prompt = 3, blocks = [{blocks}], tenat = a}}\n}}"
    )
    with pytest.raises(SageIRError) as caught:
        parse_graph(text)
    (found,) = caught.value.diagnostics
    source, carets = found.window.splitlines()
    assert len(source) < 120
    assert source[carets.index("^") :].startswith("tenat")
