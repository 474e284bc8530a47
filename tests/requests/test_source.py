"""Where requests come from: files, streams, compression, limits, broken JSON."""

import gzip
import io
import lzma
import sys
from pathlib import Path

import pytest

from sagellm_ir.diagnostics import SageIRError
from sagellm_ir.request import TextPrompt
from sagellm_ir.requests import Limits, load_requests

LINES = b'{"id": "a", "prompt": "x"}\n{"id": "b", "prompt": "y"}\n'
PRETTY = """{
  "id": "a",
  "prompt": "x"
}
{"id": "b", "prompt": "y"}"""


def ids(path: Path) -> list[str]:
    return [request.id for request in load_requests([path]).requests]


def error(path: Path) -> str:
    with pytest.raises(SageIRError) as caught:
        load_requests([path])
    return str(caught.value)


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.mark.parametrize("name", ["r.jsonl", "r.ndjson", "r.json", "r", "r.data"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    assert ids(write(tmp_path / name, LINES)) == ["a", "b"]


@pytest.mark.parametrize("name", ["r.json", "r"])
def test_pretty_printed_values(tmp_path: Path, name: str) -> None:
    assert ids(write(tmp_path / name, PRETTY)) == ["a", "b"]


def test_an_array_over_several_lines_locates_its_elements(tmp_path: Path) -> None:
    text = '[\n  {"id": "a",\n   "prompt": "x"},\n\n  {"id": "b", "prompt": "y"}\n]\n'
    path = write(tmp_path / "r.json", text)
    locations = load_requests([path]).locations
    assert {key: (loc.line, loc.column) for key, loc in locations.items()} == {
        "a": (2, 3),
        "b": (5, 3),
    }


def test_an_array_of_numbers_is_one_prompt(tmp_path: Path) -> None:
    path = write(tmp_path / "r.json", "[1,\n2,\n3]")
    assert len(load_requests([path]).requests) == 1


def test_raw_text_is_one_prompt(tmp_path: Path) -> None:
    for name in ("r.txt", "r.md", "r"):
        path = write(tmp_path / name, "Once upon\na time.\n")
        (request,) = load_requests([path]).requests
        assert request.prompt == TextPrompt("Once upon\na time.\n")


def test_json_in_a_text_file_stays_text(tmp_path: Path) -> None:
    (request,) = load_requests([write(tmp_path / "r.txt", '{"a": 1}')]).requests
    assert request.prompt == TextPrompt('{"a": 1}')


def test_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    assert ids(write(tmp_path / "r.jsonl", b"\xef\xbb\xbf" + LINES)) == ["a", "b"]


def test_blank_lines_and_crlf(tmp_path: Path) -> None:
    assert ids(write(tmp_path / "r.jsonl", b"\n\r\n" + LINES.replace(b"\n", b"\r\n\r\n"))) == [
        "a",
        "b",
    ]


def test_compressed_files(tmp_path: Path) -> None:
    assert ids(write(tmp_path / "r.jsonl.xz", lzma.compress(LINES))) == ["a", "b"]
    assert ids(write(tmp_path / "r.jsonl.gz", gzip.compress(LINES))) == ["a", "b"]


def test_zstd(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    data = zstandard.ZstdCompressor().compress(LINES)
    assert ids(write(tmp_path / "r.jsonl.zst", data)) == ["a", "b"]
    assert "cannot read" in error(write(tmp_path / "s.jsonl.zst", b"not zstd at all"))
    assert "cannot read" in error(write(tmp_path / "t.jsonl.zst", data[:-9] + b"\x00" * 9))


def test_zstd_without_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    text = error(write(tmp_path / "r.jsonl.zst", b""))
    assert "needs the optional package 'zstandard'" in text
    assert "pip install zstandard" in text


@pytest.mark.parametrize("suffix", ["xz", "gz"])
def test_damaged_compression(tmp_path: Path, suffix: str) -> None:
    data = lzma.compress(LINES * 50) if suffix == "xz" else gzip.compress(LINES * 50)
    assert "cannot read" in error(write(tmp_path / f"cut.jsonl.{suffix}", data[: len(data) // 2]))
    assert "cannot read" in error(write(tmp_path / f"odd.jsonl.{suffix}", b"plainly not packed"))


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(LINES)))
    loaded = load_requests(["-"])
    assert [request.id for request in loaded.requests] == ["a", "b"]
    assert loaded.locations["b"].file == "<stdin>"


def test_several_sources_in_order(tmp_path: Path) -> None:
    first = write(tmp_path / "1.jsonl", LINES)
    loaded = load_requests([first, str(write(tmp_path / "2.txt", "hello")), io.StringIO('"z"')])
    assert [request.id for request in loaded.requests] == ["a", "b", "r2", "r3"]


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "cannot read" in error(tmp_path / "none.jsonl")
    assert "No such file" in error(tmp_path / "none.jsonl")
    assert "directory" in error(tmp_path)


def test_one_string_is_not_a_list_of_sources() -> None:
    with pytest.raises(TypeError, match="list of sources"):
        load_requests("requests.jsonl")


def test_a_truncated_line_shows_line_column_and_caret(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", LINES + b'{"id": "c", "prompt": "tru')
    assert error(path) == (
        f"{path}:3:23: error: not JSON: it ends too early, as a truncated file does\n"
        '  {"id": "c", "prompt": "tru\n'
        "                        ^"
    )
    loaded = load_requests([path], skip_bad=True)
    assert [request.id for request in loaded.requests] == ["a", "b"]
    assert len(loaded.skipped) == 1


def test_a_bad_first_line_does_not_stop_lines(tmp_path: Path) -> None:
    loaded = load_requests([write(tmp_path / "r.jsonl", b"{oops\n" + LINES)], skip_bad=True)
    assert [request.id for request in loaded.requests] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{\n "id": "a",\n "prompt": ', "3:11"),
        ('[\n {"id": "a", "prompt": "x"},\n', "2:29"),
        ('[\n {"id": "a", "prompt": "x"}\n {"id": "b"}]', "3:2"),
        ('{\n "id": "a" "prompt": "x"}', "2:12"),
        ("[", "1:2"),
    ],
)
def test_a_broken_document_is_located(tmp_path: Path, text: str, place: str) -> None:
    path = write(tmp_path / "r.json", text)
    assert error(path).startswith(f"{path}:{place}: error: not JSON: ")


def test_a_long_line_is_shown_around_the_error(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", '{"prompt": "' + "x" * 500 + '", }')
    window = error(path).splitlines()[1:3]
    assert len(window[0]) < 70
    assert window[0][window[1].index("^")] in ",}"


@pytest.mark.parametrize("name", ["r.jsonl", "r.txt", "r.json"])
def test_not_utf8(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, b'{"prompt":\n"\xff\xfe"}' if name != "r.jsonl" else b'"\xff"\n')
    assert "not UTF-8 text" in error(path)


def test_json_that_python_refuses(tmp_path: Path) -> None:
    assert "JSON that cannot be read" in error(write(tmp_path / "r.jsonl", "[" * 100_000))
    number = '{"prompt": "x", "seed": ' + "9" * 5000 + "}"
    assert "JSON that cannot be read" in error(write(tmp_path / "s.jsonl", number))
    assert "JSON that cannot be read" in error(write(tmp_path / "t.json", "[\n" * 100_000))


def test_limits(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl.xz", lzma.compress(b'"' + b"x" * 5000 + b'"\n' + LINES))
    with pytest.raises(SageIRError, match="a line is larger than the limit of 1000 bytes"):
        load_requests([path], limits=Limits(line=1000))
    with pytest.raises(SageIRError, match="it is larger than the limit of 5010 bytes"):
        load_requests([path], limits=Limits(total=5010))
    assert len(load_requests([path], limits=Limits(line=5003, total=6000)).requests) == 3


def test_reading_stops_at_the_limit_of_requests(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", LINES + b"{broken")
    assert len(load_requests([path], limit=2).requests) == 2


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.txt", "r.csv", "r"])
def test_an_empty_file_is_a_warning(tmp_path: Path, name: str) -> None:
    loaded = load_requests([write(tmp_path / name, "")])
    assert loaded.requests == ()
    assert [warning.message for warning in loaded.warnings] == [f"no requests in {tmp_path / name}"]


def test_csv_by_suffix_and_a_broken_one(tmp_path: Path) -> None:
    header = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    row = "2023-11-16 18:15:46,374,44\n"
    loaded = load_requests([write(tmp_path / "r.csv", header + row)])
    assert [loc.line for loc in loaded.locations.values()] == [2]
    path = write(tmp_path / "s.csv", header + row + '"' + "x" * 200_000)
    assert error(path).startswith(f"{path}:3:1: error: CSV that cannot be read: ")
    (warning,) = load_requests([write(tmp_path / "t.csv", header + row[:-1] + ",9")]).warnings
    assert "'a further column' has no effect" in warning.message
    assert "GeneratedTokens: expected" in error(write(tmp_path / "t.csv", header + "2023-11-16,5"))


def test_an_archive_is_no_text(tmp_path: Path) -> None:
    import io
    import tarfile

    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("requests.jsonl"))
    text = error(write(tmp_path / "requests.tar", packed.getvalue()))
    assert "requests.tar is no text" in text
    assert "unpack an archive" in text
