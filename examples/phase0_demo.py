"""Phase 0, end to end: an engine registers with a gateway, is chatted with through it, and is timed.

    python examples/phase0_demo.py
    python examples/phase0_demo.py --model PATH --backend vllm

LMDeploy where it is installed and there is a GPU, else the embedded engine. The baseline is the same
engine with the pipeline O0: continuous batching, nothing shared. Questions about one document are asked
at the same time, first of one engine and then of the other; TTFT and TPOT are what the client sees
through the gateway. SAGE's gateway is used where it is installed, else our own.
"""

import argparse
import statistics
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain

import torch
from attrs import frozen
from mixed_fleet import console, messages, sagellm, start_gateway

from sagellm_ir.runtime.control_plane.client import UnifiedInferenceClient
from sagellm_ir.runtime.engines import find_backend


def pages(first: int, count: int = 12) -> str:
    """A document."""
    return " ".join(
        f"Page {page}. On day {page} the keeper of the lighthouse wrote down the wind, the height of the "
        f"waves and the names of {page + 2} ships, and lit the lamp at {page % 12 + 1} o'clock."
        for page in range(first, first + count)
    )


DOCUMENTS = tuple(map(pages, range(0, 100, 20)))
"""One round of questions about each. A CPU has only the first; a GPU compiles kernels when a batch first
needs them, in some of the rounds, so that medians of the rounds are shown."""
ASKED = (
    "the wind",
    "the waves",
    "the ships",
    "the lamp",
    "the keeper",
    "page 3",
    "page 7",
    "day 9",
)


@frozen
class Timed:
    """One answer, as its client saw it; seconds."""

    text: str
    pieces: int
    first: float
    whole: float

    @property
    def each(self) -> float:
        """Time of each piece after the first. A piece is a token, unless the gateway joins some."""
        return (self.whole - self.first) / max(1, self.pieces - 1)


def ask(client: UnifiedInferenceClient, model: str, document: str, topic: str) -> Timed:
    """One question about a document, streamed."""
    began, first, pieces = time.perf_counter(), 0.0, []
    question = messages(document, f"What does it say about {topic}?")
    for piece in client.stream(question, model, max_tokens=24, temperature=0):
        first = first or time.perf_counter() - began
        pieces.append(piece)
    return Timed("".join(pieces), len(pieces), first, time.perf_counter() - began)


def measure(url: str, model: str, backend: str, pipeline: str) -> list[list[Timed]]:
    """Start an engine, let it register, chat through the gateway, and stop it; the answers of each round."""
    words = ("--backend", backend, "--pipeline", pipeline, "--gateway", url)
    engine = sagellm("llm", "engine", "start", model, *words)
    try:
        with UnifiedInferenceClient.create(url) as client, ThreadPoolExecutor(len(ASKED)) as pool:
            (name,) = client.models()
            known = ", ".join(f"{e['engine_id']} ({e['state']})" for e in client.engines())
            console.print(f"{pipeline}: the gateway knows {known}")
            warm = client.chat([{"role": "user", "content": "Hi"}], name, max_tokens=4)
            assert warm["choices"]
            rounds = DOCUMENTS if torch.cuda.is_available() else DOCUMENTS[:1]
            return [list(pool.map(partial(ask, client, name, text), ASKED)) for text in rounds]
    finally:
        sagellm("llm", "engine", "stop", engine["engine_id"])


def show(label: str, rounds: list[list[Timed]]) -> None:
    first = statistics.median(statistics.fmean(a.first for a in answers) for answers in rounds)
    each = statistics.median(statistics.fmean(a.each for a in answers) for answers in rounds)
    whole = statistics.median(max(a.whole for a in answers) for answers in rounds)
    console.print(
        f"  {label:<9} TTFT {1e3 * first:7.0f} ms   TPOT {1e3 * each:6.1f} ms   all {whole:5.1f} s"
    )


def best_backend() -> str:
    """LMDeploy, if it can run here."""
    can = torch.cuda.is_available() and not find_backend("lmdeploy").missing
    return "lmdeploy" if can else "embedded"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="a known name, a folder or a file")
    parser.add_argument("--backend", default=best_backend(), help="see `sagellm-ir backend list`")
    options = parser.parse_args()
    gateway, url = start_gateway()
    try:
        planned = measure(url, options.model, options.backend, "O2")
        baseline = measure(url, options.model, options.backend, "O0")
    finally:
        gateway.terminate()
        try:
            gateway.wait(30)
        except subprocess.TimeoutExpired:
            gateway.kill()
    console.rule(f"{len(ASKED)} questions at once about one document", align="left")
    show("planned", planned)
    show("baseline", baseline)
    pairs = list(zip(chain(*planned), chain(*baseline), strict=True))
    same = sum(a.text == b.text for a, b in pairs)
    console.print(f"  {same} of {len(pairs)} answers are the same text")
    console.print(f"  {planned[0][0].text!r}", markup=False)


if __name__ == "__main__":
    main()
