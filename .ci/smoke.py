"""Run by .ci/run with the Python of an environment that holds the wheel alone: does an installed jaxinfer work?

Usage: smoke.py FIXTURES
"""

import json
import subprocess
import sys
from pathlib import Path


def run(*arguments: str) -> str:
    command = [str(Path(sys.executable).with_name("jaxinfer")), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main(fixtures: Path) -> None:
    import jaxinfer

    installed = Path(jaxinfer.__file__).parent
    assert installed.is_relative_to(sys.prefix), f"jaxinfer was imported from {installed}, not from the wheel"
    inspected = json.loads(run("inspect", str(fixtures / "llama-gqa"), "--json"))
    assert inspected["architecture"] == "llama", inspected["architecture"]
    made = json.loads(run("generate", str(fixtures / "llama-gqa"), "--ids", "5 6 7", "--max-tokens", "4", "--json"))
    assert len(made["completions"][0]["tokens"]) <= 4, made
    embedded = json.loads(run("embed", str(fixtures / "bert-sentence"), "the river", "--json"))
    assert len(embedded["embeddings"][0]) == embedded["dimensions"], embedded["dimensions"]
    print("smoke test passed:", made["completions"][0]["tokens"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
