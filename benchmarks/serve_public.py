"""A public load generator for `serve.py`: `vllm bench serve`, as it is in vLLM's package.

Its `prefix_repetition` data: random prompts, of which each group begins alike. It is called as a
module, because builds of vLLM under another name have no `vllm` command.
"""

import json
import subprocess
from pathlib import Path

__all__ = ["public_load"]

RUN = (
    "import argparse; from vllm.benchmarks.serve import add_cli_args, main; "
    "parser = argparse.ArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)
NAMES = {
    "requests_per_second": "request_throughput",
    "new_tokens_per_second": "output_throughput",
    "ttft_p50": "median_ttft_ms",
    "ttft_p99": "p99_ttft_ms",
    "tpot_p50": "median_tpot_ms",
    "tpot_p99": "p99_tpot_ms",
    "errors": "failed",
    "requests": "completed",
    "seconds": "duration",
}
"""Ours and its names of the same figures."""


def public_load(
    python: str,
    url: str,
    model: str,
    tokenizer: Path,
    *,
    clients: int,
    prompts: int,
    prefixes: int,
    prefix: int,
    suffix: int,
    new: int,
    seed: int,
) -> dict[str, float]:
    """One run; the figures under our names, without what it does not tell.

    Args:
        python: of an environment with vLLM.
        url: the server's, without `/v1`.
        model: its name there.
        tokenizer: a folder with the model's tokenizer.
        clients: requests at a time, at most.
        prompts: in all.
        prefixes: how many there are.
        prefix: tokens of each.
        suffix: tokens that are a prompt's own.
        new: tokens of an answer, at most.
        seed: of the prompts.

    Raises:
        SystemExit: it failed.
    """
    result = tokenizer / "public.json"
    words = {
        "backend": "openai-chat",
        "base-url": url,
        "endpoint": "/v1/chat/completions",
        "model": model,
        "tokenizer": tokenizer,
        "dataset-name": "prefix_repetition",
        "prefix-repetition-num-prefixes": prefixes,
        "prefix-repetition-prefix-len": prefix,
        "prefix-repetition-suffix-len": suffix,
        "prefix-repetition-output-len": new,
        "num-prompts": prompts,
        "max-concurrency": clients,
        "temperature": 0,
        "seed": seed,
        "result-dir": result.parent,
        "result-filename": result.name,
    }
    command = [python, "-c", RUN, "--save-result", "--disable-tqdm"]
    for name, value in words.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"vllm bench serve failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    found = json.loads(result.read_text())
    return {ours: found[theirs] for ours, theirs in NAMES.items()}
