"""The driver's side of the benchmarks: peers as processes, rounds that interleave them, tables and JSON.

Each peer runs in its own interpreter and process, so that torch and JAX need no common environment and memory can be
told apart. All take turns within a round (A B C, B C A, ...), so that a slow minute of the machine falls on all of
them; rates are compared within a round, and the median of those ratios is what counts. Only one worker is active at a
time, the others sleep on stdin.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PEERS = HERE / "peers"


class Worker:
    """A peer in a process of its own, see peers/protocol.py."""

    def __init__(self, name: str, command: Sequence[str | Path], environment: Mapping[str, str] | None = None):
        self.name, self.peak_rss, self.seconds = name, 0, 0.0
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **(environment or {})},
        )

    def call(self, op: str, **arguments: Any) -> Any:
        """The result of one operation; `seconds` and `peak_rss` are then its time and the process's peak so far."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": f"the worker ended with code {self._process.wait()}"}
        if "error" in answer:
            self._log.seek(0)
            raise SystemExit(f"{self.name}: {op} failed\n{self._log.read()[-4000:]}\n{answer['error']}")
        self.seconds, self.peak_rss = answer["seconds"], answer["peak_rss"]
        return answer["result"]

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def interleave(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each measure once a round; who begins moves on by one each round."""
    names, values = list(measures), {name: [] for name in measures}
    for index in range(rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            values[name].append(measures[name]())
    return values


def ratios(values: Mapping[str, Sequence[float]], subject: str) -> dict[str, float]:
    """Subject over each other peer: the median of the rounds' own ratios."""
    mine = values[subject]
    return {
        name: statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
        for name, theirs in values.items()
        if name != subject
    }


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """GitHub markdown, the first column to the left and the others to the right."""
    cells = [[str(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]

    def line(row: Sequence[str]) -> str:
        padded = [c.rjust(width) if i else c.ljust(width) for i, (c, width) in enumerate(zip(row, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    lines = [line(row) for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|")
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int = 1) -> str:
    """median (min-max)"""
    middle = statistics.median(values)
    return f"{middle:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def comparison(unit: str, measured: Mapping[str, Mapping[str, Sequence[float]]], subject: str) -> str:
    """A row a scenario and a column a peer: rates with their spread, and the subject's ratio to each other peer."""
    names = list(next(iter(measured.values())))
    rows = []
    for scenario, values in measured.items():
        paired = ratios(values, subject) if subject in values else {}
        cells = [spread(values[name]) + (f" {paired[name]:.2f}x" if name in paired else "") for name in names]
        rows.append([scenario, *cells])
    note = f"\n\nN.NNx: {subject} is so many times as fast, the median over rounds." if subject in names else ""
    return table([unit, *names], rows) + note


def machine(threads: int) -> str:
    """One line about this machine, without its name."""
    model, memory = platform.processor() or platform.machine(), ""
    cpuinfo, meminfo = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
        flags = next((line.split() for line in lines if line.startswith("flags")), [])
        model += "".join(f", {flag}" for flag in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if flag in flags)
    if meminfo.exists():
        memory = f", {int(meminfo.read_text().split()[1]) / 2**20:.0f} GiB memory"
    system = f"{platform.system()} {platform.release()}"
    return f"{model}, {threads} threads on {os.cpu_count()} cores{memory}, {system}, Python {platform.python_version()}"


def bind(threads: int) -> None:
    """Gives this process and its workers `threads` cores, so that peers which count cores agree with those told."""
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > 0.5:
        # torch's and llama.cpp's threads spin at their barriers: beside other work they lose far more than XLA's do.
        print(f"warning: the machine is busy (load {load:.1f}); wait until it is quiet, or the ratios mean nothing")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def parser(doc: str, name: str) -> argparse.ArgumentParser:
    """The arguments that all benchmarks share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--jaxinfer-python", default=sys.executable, help="interpreter with jaxinfer")
    made.add_argument("--torch-python", default=sys.executable, help="interpreter with the peers and gguf")
    made.add_argument("--checkpoint", type=Path, help="instead of the one that jaxinfer fetches")
    made.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "jaxinfer-benchmarks", help="scratch")
    made.add_argument("--out", type=Path, default=HERE / "results" / name, help="results, without a suffix")
    made.add_argument("--threads", type=int, default=cores)
    made.add_argument("--rounds", type=int, default=5)
    return made


def fetch(python: str, name: str) -> Path:
    """The checkpoint that jaxinfer knows by this name, downloaded if need be."""
    code = f"from jaxinfer.checkpoints.hub import fetch; print(fetch({name!r}))"
    return Path(subprocess.run([python, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout.strip())


def make_models(python: str, kind: str, source: Path, work: Path) -> None:
    subprocess.run([python, PEERS / "make_models.py", kind, source, work], check=True)


def write(
    out: Path, settings: argparse.Namespace, versions: Mapping[str, str], parts: Mapping[str, str], raw: Any
) -> None:
    """OUT.md with the tables and OUT.json with every round's figure."""
    shown = {key: value for key, value in vars(settings).items() if not isinstance(value, Path) and "python" not in key}
    about = {"machine": machine(settings.threads), "settings": shown, "versions": dict(versions)}
    lines = [about["machine"], "", "; ".join(dict.fromkeys(versions.values())), "", f"Settings: {json.dumps(shown)}"]
    for title, text in parts.items():
        lines += ["", f"## {title}", "", text]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    out.with_suffix(".json").write_text(json.dumps({**about, "measured": raw}, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))
