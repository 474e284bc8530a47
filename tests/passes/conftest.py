"""Runs `*.ir` files as tests: cases split by `// -----`, each checked by filecheck, in process.

    // RUN: --pipeline 'prefix-dedup'
    // CHECK: %a = prefill @r0[0:16]
    sagellm_ir 1
    ...

The RUN line of a file's first line is that of all its cases.
"""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from filecheck.finput import FInput
from filecheck.matcher import Matcher
from filecheck.options import Options
from filecheck.parser import Parser, pattern_for_opts

from sagellm_ir.passes.instruments.reproducer import read_run_line
from sagellm_ir.passes.manager import PassManager
from sagellm_ir.text import parse_graph, print_graph


class CheckFailed(Exception):
    """The output does not match the checks."""


class IRFile(pytest.File):
    def collect(self) -> Iterator["IRCase"]:
        text, line = self.path.read_text(encoding="utf-8"), 0
        for case in text.split("// -----\n"):
            title = case.strip().partition("\n")[0].removeprefix("//").strip()
            title = f"{line + 1}: {title}" if line else "1"
            # Blank lines before a case make its line numbers those of the file.
            yield IRCase.from_parent(self, name=title, run=text, case="\n" * line + case)
            line += case.count("\n") + 1


class IRCase(pytest.Item):
    def __init__(self, *, run: str, case: str, **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.pipeline = read_run_line(run, str(self.path))
        self.case = case

    def runtest(self) -> None:
        graph = parse_graph(self.case, str(self.path))
        output = print_graph(PassManager(self.pipeline).run(graph))
        options = Options(str(self.path), input_file="<result>")
        parser = Parser(options, io.StringIO(self.case), *pattern_for_opts(options))
        matcher = Matcher(options, FInput("<result>", output), parser)
        matcher.stderr = io.StringIO()
        if matcher.run():
            raise CheckFailed(f"{matcher.stderr.getvalue()}\n{output}")

    def repr_failure(
        self, excinfo: pytest.ExceptionInfo[BaseException], style: object = None
    ) -> str:
        return (
            str(excinfo.value) if excinfo.errisinstance((CheckFailed,)) else str(excinfo.getrepr())
        )

    def reportinfo(self) -> tuple[Path, int, str]:
        return (
            self.path,
            self.case[: len(self.case) - len(self.case.lstrip("\n"))].count("\n"),
            self.name,
        )


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> IRFile | None:
    return IRFile.from_parent(parent, path=file_path) if file_path.suffix == ".ir" else None
