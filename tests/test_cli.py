"""The command's own behaviour, with a scripted model: what is printed where, exit codes, input and output files."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import jaxinfer
from jaxinfer.checkpoints import hub
from jaxinfer.cli import app, common
from jaxinfer.errors import RequestError

COMMANDS = ["demo", "generate", "chat", "embed", "inspect", "doctor"]


def run(*arguments: str, stdin: str | None = None):
    return CliRunner().invoke(app, list(arguments), input=stdin)


def spawn(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", "-m", "jaxinfer.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=60)


@dataclass
class Piece:
    """A Completion or a Delta, as far as the command looks at them."""

    text: str | None
    tokens: list[int]
    logprobs: Any = None
    finish_reason: str | None = None


@dataclass
class LanguageModel:
    """Answers each prompt with its words turned round, a token a word, and keeps what it was asked."""

    asked: list[Any] = field(default_factory=list)
    has_tokenizer: bool = True
    interrupt_after: int | None = None

    def stream(self, prompt, **options):
        self.asked.append((prompt, options))
        return self.pieces(prompt)

    def pieces(self, prompt):
        words = prompt.split()[::-1] if isinstance(prompt, str) else prompt[::-1]
        for i, word in enumerate(words):
            if i == self.interrupt_after:
                raise KeyboardInterrupt
            yield Piece(f"{word} " if self.has_tokenizer else None, [i])

    def chat(self, messages, stream=False, **options):
        assert stream
        if messages[-1]["content"] == "too long":
            raise RequestError("the prompt has 99 tokens, the limit is 64: shorten it")
        self.asked.append(messages)
        return self.stream(messages[-1]["content"], **options)

    def generate(self, prompts, n=1, logprobs=0, **options):
        self.asked.append((prompts, options | {"n": n, "logprobs": logprobs}))
        pieces = [list(self.stream(prompt)) for prompt in prompts for _ in range(n)]
        return [Piece("".join(p.text or "" for p in ps), [0] * len(ps), float("-inf"), "stop") for ps in pieces]

    def compile_report(self):
        return {"compiled": 3, "loaded": 2, "seconds": 0.0}


class Encoder:
    def embed(self, texts, batch_size=32, progress=False):
        return np.array([[len(text), 1 / 3] for text in texts], np.float32)


@pytest.fixture
def lm(monkeypatch, tmp_path) -> LanguageModel:
    model = LanguageModel()
    serve(monkeypatch, tmp_path, model)
    return model


@pytest.fixture
def encoder(monkeypatch, tmp_path):
    serve(monkeypatch, tmp_path, Encoder())


def serve(monkeypatch, folder, model):
    monkeypatch.setattr(hub, "fetch", lambda name, progress=None: folder)
    monkeypatch.setitem(vars(jaxinfer), "load", lambda path, **options: model)


# Without JAX


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_describes_the_command(command):
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    for name in COMMANDS if not command else ["--debug"]:
        assert name in result.output
    assert max(map(len, result.output.splitlines())) <= 100


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["doctor", "--quick"], ["--version"]])
def test_help_and_quick_doctor_do_not_import_jax(arguments):
    result = spawn(*arguments)
    assert result.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & {"jax", "jaxlib", "flax"}


def test_inspect_does_not_import_jax(repository):
    result = spawn("inspect", str(repository / "tests/fixtures/llama-gqa"))
    assert result.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "tokenizers" in imported
    assert not imported & {"jax", "jaxlib", "flax"}


def test_no_command_shows_the_help():
    result = run()
    assert "generate" in result.output
    assert result.exit_code == 2


def test_inspect_json_counts_what_the_fixture_holds(repository):
    folder = repository / "tests/fixtures/llama-gqa"
    result = run("inspect", str(folder), "--json")
    assert result.exit_code == 0
    shown = json.loads(result.stdout)
    config = json.loads((folder / "config.json").read_text())
    assert shown["architecture"] == "llama"
    assert shown["supported"] is True
    assert shown["config"]["hidden_size"] == config["hidden_size"]
    assert {"name": "model.norm.weight", "shape": [32], "dtype": "F32", "bytes": 128} in shown["tensors"]
    assert shown["parameters"] == sum(int(np.prod(t["shape"])) for t in shown["tensors"])
    assert shown["dtypes"]["F32"]["bytes"] == shown["bytes"] == 4 * shown["parameters"]
    assert shown["tokenizer"]["kind"] == "BPE"
    assert shown["tokenizer"]["chat_template"] is True


def test_inspect_folds_layers_unless_asked_for_all(repository):
    folder = str(repository / "tests/fixtures/llama-gqa")
    folded, full = run("inspect", folder).stdout, run("inspect", folder, "--all").stdout
    assert "model.layers.{i}.self_attn.q_proj.weight" in folded
    assert "model.layers.1." not in folded
    assert "model.layers.1.self_attn.q_proj.weight" in full


def test_inspect_shows_an_unsupported_architecture_and_spells_out_control_characters(repository, tmp_path):
    source = repository / "tests/fixtures/llama-tied"
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text()) | {"model_type": "mamba\x1b[31m[red]"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run("inspect", str(tmp_path))
    assert result.exit_code == 0
    assert r"mamba\x1b[31m[red] (not supported; supported: bert, llama)" in result.stdout
    assert "\x1b" not in result.stdout


def test_doctor_tells_versions_and_cache(tmp_path):
    result = run("doctor", "--quick", "--json")
    assert result.exit_code == 0
    shown = json.loads(result.stdout)
    assert shown["packages"]["numpy"] == np.__version__
    assert shown["devices"] is None
    assert shown["cache"]["path"] == os.environ["JAXINFER_CACHE"]
    assert shown["problems"] == []
    assert shown["extras"]["tpu"] == {"missing": ["libtpu"], "install": "pip install 'jaxinfer[tpu]'"}


def test_doctor_counts_the_cache_and_sees_one_that_cannot_be_used(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache/checkpoints/tiny-1.0").mkdir(parents=True)
    (tmp_path / "cache/checkpoints/tiny-1.0/weights").write_bytes(bytes(1234))
    assert json.loads(run("doctor", "--quick", "--json").stdout)["cache"] == {
        "path": str(tmp_path / "cache"),
        "writable": True,
        "bytes": 1234,
        "checkpoints": ["tiny-1.0"],
    }
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path / "file"))
    result = run("doctor", "--quick")
    assert result.exit_code == 1
    assert "can't be written: set JAXINFER_CACHE" in result.stdout


def test_doctor_lists_devices():
    shown = json.loads(run("doctor", "--json").stdout)
    assert [d["platform"] for d in shown["devices"]] == ["cpu"] * 8


# Errors


def one_line_error(result) -> str:
    """The error's text, having checked that it is all there is to see."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("command", [["inspect"], ["generate", "--ids", "--max-tokens", "1"], ["embed"], ["chat"]])
def test_a_missing_path_is_one_line_that_lists_the_known_names(command, tmp_path):
    arguments = [command[0], str(tmp_path / "missing"), *command[1:]]
    assert "all-minilm-l6-v2, smollm2-135m" in one_line_error(run(*arguments, stdin="1"))


def test_debug_shows_the_traceback_as_well(tmp_path):
    result = run("inspect", str(tmp_path / "missing"), "--debug")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: no checkpoint at")


def test_texts_must_come_from_one_place(tmp_path):
    error = one_line_error(run("embed", "all-minilm-l6-v2", "a", "--file", str(tmp_path)))
    assert "both as arguments and by --file" in error


def test_unreadable_files_are_one_line(tmp_path):
    missing = str(tmp_path / "missing.txt")
    assert (
        one_line_error(run("embed", "all-minilm-l6-v2", "-f", missing))
        == f"error: {missing}: No such file or directory"
    )
    binary = tmp_path / "binary"
    binary.write_bytes(b"ab\xff")
    assert "is not UTF-8 text: invalid start byte at byte 2" in one_line_error(
        run("generate", "smollm2-135m", "-f", str(binary))
    )


def test_token_ids_must_be_numbers():
    assert "with --ids a prompt is token ids" in one_line_error(run("generate", "smollm2-135m", "--ids", "1 two"))


def test_logprobs_without_json_are_refused():
    assert "add --json" in one_line_error(run("generate", "smollm2-135m", "hi", "--logprobs", "2"))


def test_the_wrong_kind_of_model_names_the_right_command(lm):
    assert "is a LanguageModel, this command needs a Encoder: use jaxinfer generate or chat" in one_line_error(
        run("embed", "smollm2-135m", "hi")
    )


def test_control_characters_of_an_error_are_spelled_out():
    assert r"\x1b[2J" in one_line_error(run("inspect", "evil\x1b[2J\nname"))


# generate


def test_one_prompt_streams_to_stdout_alone(lm):
    result = run(
        "generate", "smollm2-135m", "a b c", "--stop", "x", "--stop", "y", "--seed", "7", "--temperature", "0.5"
    )
    assert (result.exit_code, result.stdout, result.stderr) == (0, "c b a \n", "")
    ((prompt, options),) = lm.asked
    assert prompt == "a b c"
    assert options == {
        "max_tokens": 64,
        "temperature": 0.5,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "seed": 7,
        "stop": ("x", "y"),
    }


def test_several_prompts_are_one_batch_and_json_holds_no_infinity(lm):
    result = run("generate", "smollm2-135m", "a b", "c", "--n", "2", "--logprobs", "1", "--json")
    assert result.exit_code == 0
    prompts, options = lm.asked[0]
    assert prompts == ["a b", "c"]
    assert (options["n"], options["logprobs"]) == (2, 1)
    completions = json.loads(result.stdout)["completions"]
    assert [(c["prompt"], c["sample"], c["text"]) for c in completions] == [
        (0, 0, "b a "),
        (0, 1, "b a "),
        (1, 0, "c "),
        (1, 1, "c "),
    ]
    assert completions[0]["logprobs"] is None


def test_several_prompts_are_headed_in_text(lm):
    shown = run("generate", "smollm2-135m", "a b", "c").stdout
    assert shown.index("prompt 1") < shown.index("b a ") < shown.index("prompt 2") < shown.index("c ")


def test_prompts_from_files_pipes_and_lines(lm, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("first line\nsecond line\n")
    run("generate", "smollm2-135m", "--file", str(file))
    run("generate", "smollm2-135m", stdin="piped\n\n")
    run("generate", "smollm2-135m", "-f", "-", "--lines", stdin="one\r\ntwo\x0c\u2028same\n\nlast")
    assert [asked[0] for asked in lm.asked[:3]] == [
        "first line\nsecond line",
        "piped\n",
        ["one", "two\x0c\u2028same", "", "last"],
    ]


def test_token_ids_go_in_and_come_out_of_a_model_without_tokenizer(lm):
    lm.has_tokenizer = False
    result = run("generate", "smollm2-135m", "--ids", "5, 6 7")
    assert lm.asked[0][0] == [5, 6, 7]
    assert result.stdout == "0 1 2 \n"


def test_an_interrupt_ends_with_130_and_keeps_what_was_said(lm):
    lm.interrupt_after = 2
    result = run("generate", "smollm2-135m", "a b c")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "c b \n", "interrupted\n")


# chat


def test_chat_remembers_until_reset(lm):
    result = run("chat", "--system", "be brief", stdin="one two\nthree\n/reset\n\nfour\n/exit\nfive\n")
    assert result.exit_code == 0
    system = {"role": "system", "content": "be brief"}
    talks = [asked for asked in lm.asked if isinstance(asked, list)]
    assert [[m["content"] for m in talk] for talk in talks] == [
        ["be brief", "one two"],
        ["be brief", "one two", "two one ", "three"],
        ["be brief", "four"],
    ]
    assert talks[1][0] == system
    assert [m["role"] for m in talks[1]] == ["system", "user", "assistant", "user"]
    assert result.stdout == "two one \nthree \nfour \n"


def test_chat_on_a_pipe_ends_at_an_error(lm):
    result = run("chat", stdin="hi\ntoo long\nmore\n")
    assert (result.exit_code, result.stdout) == (2, "hi \n")
    assert result.stderr == "error: the prompt has 99 tokens, the limit is 64: shorten it\n"


def test_chat_at_a_terminal_takes_back_a_turn_that_cannot_be_served(lm, monkeypatch):
    lines = iter(["hi", "too long", "again", "/help"])

    def answer(prompt):
        assert prompt == "\n> "
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(common.sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    from jaxinfer.cli.chat import chat

    chat("smollm2-135m")
    talks = [[m["content"] for m in asked] for asked in lm.asked if isinstance(asked, list)]
    assert talks == [["hi"], ["hi", "hi ", "again"]]


def test_chat_at_a_terminal_survives_an_interrupted_answer(lm, monkeypatch):
    from jaxinfer.cli.chat import _answer

    lm.interrupt_after = 1
    question = {"role": "user", "content": "a b c"}
    assert _answer(lm, [question], {}, True) == [question, {"role": "assistant", "content": "c "}]
    with pytest.raises(KeyboardInterrupt):
        _answer(lm, [question], {}, False)


# embed


def test_embed_writes_an_array_a_row_a_line(encoder, tmp_path):
    out = tmp_path / "vectors"
    result = run("embed", "all-minilm-l6-v2", "--out", str(out), stdin="ab\n\nabc\n")
    assert (result.exit_code, result.stdout) == (0, "")
    vectors = np.load(out)
    assert vectors.dtype == np.float32
    assert vectors[:, 0].tolist() == [2, 0, 3]
    assert list(tmp_path.iterdir()) == [out]


def test_embed_json_keeps_every_bit(encoder):
    shown = json.loads(run("embed", "all-minilm-l6-v2", "ab", "--json").stdout)
    assert shown["dimensions"] == 2
    assert np.float32(shown["embeddings"][0][1]) == np.float32(1 / 3)
    assert shown["embeddings"][0][1] == 0.33333334


def test_embed_shows_cosines(encoder):
    shown = run("embed", "all-minilm-l6-v2", "a", "[red]bbbb").stdout
    assert "1.0000" in shown
    assert "[red]bbbb" in shown


def test_embed_to_a_missing_folder_is_refused_before_any_work(tmp_path):
    error = one_line_error(run("embed", "all-minilm-l6-v2", "a", "--out", str(tmp_path / "no" / "v.npy")))
    assert f"there is no folder {tmp_path / 'no'}" in error


# demo


def test_demo_tells_the_answer_and_its_figures(lm):
    result = run("demo", "why is it so")
    assert result.exit_code == 0
    assert result.stdout.startswith("> why is it so\n\nso it is why ")
    assert "programs: 3 compiled, 2 from the cache" in result.stdout
    assert "4 tokens at" in result.stdout


def test_demo_json_is_one_document(lm):
    shown = json.loads(run("demo", "why is it so", "--json").stdout)
    assert (shown["answer"], shown["tokens"]) == ("so it is why ", 4)
    assert shown["programs_compiled"] == 3
    assert 0 < shown["load_s"] < shown["start_to_first_token_s"]


def test_sizes_are_for_people():
    assert [common.size(n) for n in (0, 999, 1000, 98_362_432, 5e12)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "98.4 MB",
        "5000.0 GB",
    ]
