"""SmolLM2-135M-Instruct: jaxinfer beside transformers and llama.cpp, on the same dequantised weights.

    python benchmarks/generate.py --torch-python PYTHON

- decode: greedy tokens/s of all sequences together, end of sequence ignored. The prompts are run for 1 token and for
  --new-tokens; the difference of the two times is the decoding of --new-tokens - 1.
- prefill: tokens/s of a 512-token prompt, until its first new token.
- memory: peak resident memory of a process that only loads and does one thing; jaxinfer's programs come from its cache.
- cold start: from the start of the process to its first token, as whole processes; the first run with jaxinfer's cache
  empty, the second with what the first left. The files are in the page cache for all.
- agreement: the share of leading greedy tokens (texts for llama.cpp, which tells no ids) equal to transformers'.

jaxinfer reads the GGUF as shipped, or what --checkpoint names; transformers a float32 safetensors folder; llama.cpp a
float32 and a Q8_0 GGUF, all made from it.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import harness
from harness import PEERS, Worker

CONTEXT = 640  # tokens a sequence: the 512 of the prefill and room to decode
SUBJECT, REFERENCE = "jaxinfer", "transformers"


class Peer:
    """How to start one peer, and where its weights are."""

    def __init__(self, name: str, python: str, script: str, path: Path, threads: int, cache: Path):
        self.name, self.path, self.threads, self.cache = name, path, threads, cache
        self._command = [python, PEERS / script, "language"]

    def start(self, cache: Path | None = None) -> Worker:
        return Worker(self.name, self._command, {"JAXINFER_CACHE": str(cache or self.cache)})

    def prepare(self, worker: Worker, sequences: int) -> str:
        return worker.call("prepare", path=str(self.path), threads=self.threads, sequences=sequences, context=CONTEXT)


def peers(args: argparse.Namespace) -> list[Peer]:
    """All peers asked for, their weights made."""
    checkpoint = args.checkpoint or harness.fetch(args.jaxinfer_python, "smollm2-135m")
    harness.make_models(args.torch_python, "language", args.gguf or checkpoint, args.work)
    rows = {
        SUBJECT: (args.jaxinfer_python, "jaxinfer_peer.py", checkpoint),
        REFERENCE: (args.torch_python, "transformers_peer.py", args.work / "transformers"),
        "llama.cpp F32": (args.torch_python, "llama_cpp_peer.py", args.work / "F32.gguf"),
        "llama.cpp Q8_0": (args.torch_python, "llama_cpp_peer.py", args.work / "Q8_0.gguf"),
    }
    wanted = args.peers or list(rows)
    if unknown := set(wanted) - set(rows):
        raise SystemExit(f"--peers must be of {list(rows)}; got {sorted(unknown)}")
    return [Peer(name, *rows[name], args.threads, args.work / "cache") for name in wanted]


def throughput(all_peers: list[Peer], prompts: dict[str, Any], args: argparse.Namespace) -> tuple[dict, dict, dict]:
    """-> rates {scenario: {peer: [a round's]}}, versions, and the tokens and texts of the largest batch."""
    rates, versions, outputs = {}, {}, {}
    with ExitStack() as stack:
        workers = {peer.name: stack.enter_context(peer.start()) for peer in all_peers}

        def seconds(name: str, inputs: list[list[int]], tokens: int) -> float:
            outputs[name] = workers[name].call("generate", prompts=inputs, max_tokens=tokens)
            return workers[name].seconds

        def decode(name: str, inputs: list[list[int]]) -> float:
            first = seconds(name, inputs, 1)
            return len(inputs) * (args.new_tokens - 1) / (seconds(name, inputs, args.new_tokens) - first)

        def measure(scenario: str, sequences: int, one: Callable[[str], float]) -> None:
            for peer in all_peers:
                versions[peer.name] = peer.prepare(workers[peer.name], sequences)
                one(peer.name)  # what is compiled or paged in on first use is not counted
            rates[scenario] = harness.interleave({name: lambda name=name: one(name) for name in workers}, args.rounds)
            print(
                f"{scenario}: " + ", ".join(f"{k} {harness.spread(v)}" for k, v in rates[scenario].items()), flush=True
            )

        measure("prefill 512", 1, lambda name: 512 / seconds(name, [prompts["prefill"]], 1))
        for count in args.sequences:
            measure(f"decode {count}", count, lambda name, count=count: decode(name, prompts["decode"][:count]))
    return rates, versions, outputs


def agreement(outputs: dict[str, dict]) -> dict[str, float]:
    """The share of greedy tokens before the first that differs from transformers', by peer."""

    def share(mine: list, theirs: list) -> float:
        equal = total = 0
        for a, b in zip(mine, theirs, strict=True):
            total += len(b)
            equal += next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        return equal / total

    found = {}
    if SUBJECT in outputs and REFERENCE in outputs:
        found[f"{SUBJECT}, tokens as {REFERENCE}"] = share(outputs[SUBJECT]["tokens"], outputs[REFERENCE]["tokens"])
    for name, output in outputs.items():
        if name.startswith("llama.cpp") and SUBJECT in outputs:
            found[f"{name}, characters as {SUBJECT}"] = share(output["texts"], outputs[SUBJECT]["texts"])
    return found


def memory(all_peers: list[Peer], prompts: dict[str, Any], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Peak MB by scenario and peer, each in a fresh process."""
    most = max(args.sequences)
    inputs = {
        "load, decode 1": (prompts["decode"][:1], args.new_tokens),
        "load, prefill 512": ([prompts["prefill"]], 1),
        f"load, decode {most}": (prompts["decode"][:most], args.new_tokens),
    }
    peaks: dict[str, dict[str, float]] = {scenario: {} for scenario in inputs}
    for scenario, (rows, tokens) in inputs.items():
        for peer in all_peers:
            with peer.start() as worker:
                peer.prepare(worker, len(rows))
                worker.call("generate", prompts=rows, max_tokens=tokens)
                peaks[scenario][peer.name] = worker.peak_rss / 1e6
    return peaks


def cold_start(all_peers: list[Peer], prompts: dict[str, Any], args: argparse.Namespace) -> dict[str, dict[str, list]]:
    """{"first run" | "second run": {peer: [seconds]}}, and the peak MB of these processes."""
    found: dict[str, dict[str, list]] = {
        row: {peer.name: [] for peer in all_peers} for row in ("first run", "second run", "first MB", "second MB")
    }
    for _ in range(args.cold_rounds):
        for peer in all_peers:
            with tempfile.TemporaryDirectory(dir=args.work) as cache:
                for run in ("first", "second"):
                    with peer.start(Path(cache)) as worker:
                        worker.call(
                            "first_token",
                            path=str(peer.path),
                            threads=args.threads,
                            prompt=prompts["decode"][0],
                            context=CONTEXT,
                        )
                        found[f"{run} run"][peer.name].append(time.perf_counter() - worker.started)
                    found[f"{run} MB"][peer.name].append(worker.peak_rss / 1e6)
    return found


def main() -> None:
    parser = harness.parser(__doc__ or "", "generate")
    parser.add_argument("--gguf", type=Path, help="what the peers' weights are made from, if --checkpoint is no GGUF")
    parser.add_argument("--peers", nargs="+", help="a subset, in the order of the table")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--cold-rounds", type=int, default=3)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    harness.bind(args.threads)
    all_peers = peers(args)
    prompts = json.loads((harness.HERE / "prompts.json").read_text(encoding="utf-8"))
    rates, versions, outputs = throughput(all_peers, prompts, args)
    names = [peer.name for peer in all_peers]
    parts = {"Tokens per second": harness.comparison("tokens/s", rates, SUBJECT)}
    raw: dict[str, Any] = {"tokens per second": rates, "agreement": agreement(outputs)}
    if raw["agreement"]:
        shares = [[name, f"{share:.3f}"] for name, share in raw["agreement"].items()]
        parts["Agreement"] = harness.table(["equal before the first difference", "share"], shares)
    raw["peak MB"] = memory(all_peers, prompts, args)
    parts["Peak resident memory, MB"] = harness.table(
        ["process", *names], [[row, *(f"{cells[n]:.0f}" for n in names)] for row, cells in raw["peak MB"].items()]
    )
    if args.cold_rounds:
        raw["cold start"] = cold_start(all_peers, prompts, args)
        rows = [
            [row, *(harness.spread(cells[name], 0 if "MB" in row else 2) for name in names)]
            for row, cells in raw["cold start"].items()
        ]
        parts["Cold start to first token, seconds; peak MB"] = harness.table(["process", *names], rows)
    harness.write(args.out, args, versions, parts, raw)


if __name__ == "__main__":
    main()
