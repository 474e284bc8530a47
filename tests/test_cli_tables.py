"""Tables of the command line show what they are given."""

import pytest

from sagellm_ir.cli.shared import print_table


def test_brackets_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("t", ("to install",), [("pip install 'a[vllm]'",)])
    assert "pip install 'a[vllm]'" in capsys.readouterr().out
