"""A fleet behind one gateway: two sageLLM engines, vLLM driven by plans, and any server you have.

    python examples/mixed_fleet.py
    python examples/mixed_fleet.py --vllm build/vllm/0.32.0/bin/python
    python examples/mixed_fleet.py --also vllm=http://gpu1.local:$PORT

Requests of one document go to the engine that holds it. Then the engine that is answering is killed
in the middle of a sentence, and the client reads on. SAGE's gateway is used where it is installed
(`pip install 'sagellm-ir[gateway]'`), else our own.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import httpx
from rich.console import Console

from sagellm_ir.runtime.control_plane.client import UnifiedInferenceClient

MODEL = "smollm2-135m"
DOCUMENTS = (
    "The lighthouse was built in 1821 by two brothers. It is forty metres high, painted white and "
    "red, and its lamp is still lit by hand on the first night of every winter.",
    "The market opens at five. Fishermen sell what they caught in the night, and by eight there is "
    "nothing left but ice, gulls and the smell of coffee from the bar at the corner.",
    "Two sisters walk the old railway line each autumn, nine days from the mountains to the sea, and "
    "sleep in the empty stations. They have never met a train.",
)
QUESTIONS = ("What is this text about?", "Name one number in it.", "Who is in it?")

console = Console(highlight=False)


def sagellm(*words: str, python: str = sys.executable) -> Any:
    """A command of ours, and its JSON."""
    command = (python, "-m", "sagellm_ir", *words, "--json")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def messages(document: str, question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{document}\n\n{question}"}]


def load(engine: dict[str, Any]) -> dict[str, int]:
    """What an engine says of itself."""
    found: dict[str, int] = httpx.get(f"{engine['url']}/info").json()["load"]
    return found


def ask_all(client: UnifiedInferenceClient, engines: Sequence[dict[str, Any]]) -> None:
    """Each question about each document; the engines' own figures show where they went."""
    for question in QUESTIONS:
        for document in DOCUMENTS:
            answer = client.chat(messages(document, question), MODEL, max_tokens=16, temperature=0)
            console.print(f"  {question} {answer['choices'][0]['message']['content']!r}")
    for engine in engines:
        seen = load(engine)
        share = seen["cached_tokens"] / max(1, seen["prompt_tokens"])
        console.print(f"  {engine['engine_id']}: {seen['finished']} answers, {share:.0%} cached")


def kill_mid_answer(client: UnifiedInferenceClient, engines: Sequence[dict[str, Any]]) -> None:
    """Kill the engine that answers; the text goes on."""
    question = messages(DOCUMENTS[0], "Tell it again, at length.")
    pieces = client.stream(question, MODEL, max_tokens=96, temperature=0)
    text = "".join(next(pieces) for _ in range(8))
    console.print(f"  {text}", end="", markup=False)
    for engine in engines:
        if load(engine)["running"]:
            os.kill(engine["pid"], signal.SIGKILL)
            console.print(f" <{engine['engine_id']} killed> ", end="", style="red", markup=False)
    console.print("".join(pieces), markup=False)


def start_gateway() -> tuple["subprocess.Popen[str]", str]:
    command = (sys.executable, "-m", "sagellm_ir", "gateway", "start", "--port", "0")
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        if not line:
            log.seek(0)
            raise SystemExit(f"the gateway did not start:\n{log.read()}")
    console.print(line)
    return process, line.split()[-1].removesuffix("/v1")


def run(also: Sequence[str], vllm: str | None) -> None:
    process, url = start_gateway()
    try:
        start = ("llm", "engine", "start", MODEL, "--gateway", url)
        engines = [sagellm(*start) for _ in range(2)]
        if vllm:
            engines.append(sagellm(*start, "--backend", "vllm", python=vllm))
        for engine in engines:
            console.print(f"engine {engine['engine_id']} at {engine['url']}")
        for server in also:
            kind, _, place = server.partition("=")
            words = (place, "--engine-kind", kind, "--gateway", url, "--model", MODEL)
            console.print(f"engine {sagellm('llm', 'engine', 'attach', *words)['engine_id']}")
        with UnifiedInferenceClient.create(url) as client:
            console.rule("Questions about a few documents", align="left")
            ask_all(client, engines)
            console.rule("The engine is killed in the middle of an answer", align="left")
            kill_mid_answer(client, engines)
            console.rule("What the gateway knows now", align="left")
            for engine in client.engines():
                console.print(f"  {engine['engine_id']}: {engine['state']}")
    finally:
        sagellm("llm", "engine", "stop", "--all")
        process.terminate()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="KIND=URL",
        help=f"a running server that serves {MODEL!r} with an OpenAI API; may be repeated",
    )
    parser.add_argument(
        "--vllm", metavar="PYTHON", help="also an engine of vLLM, by the interpreter that has it"
    )
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SAGELLM_STATE_DIR"] = folder  # engines of the user's own are left alone
        run(chosen.also, chosen.vllm)


if __name__ == "__main__":
    main()
