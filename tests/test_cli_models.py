"""The command on tiny real checkpoints: results equal to the oracle's, and bad input ending in one line each."""

import json
import shutil
import struct
from pathlib import Path

import checkpoint_helpers
import numpy as np
import pytest
from test_cli import one_line_error, run

BAD_INPUT_COMMANDS = [
    pytest.param(["generate", "--ids", "1 2", "--max-tokens", "1"], id="generate"),
    pytest.param(["chat"], id="chat"),
]


@pytest.fixture
def fixtures() -> Path:
    return checkpoint_helpers.fixtures()


@pytest.fixture
def llama(fixtures, tmp_path) -> Path:
    """A copy of the Llama fixture, to be spoilt."""
    return Path(shutil.copytree(fixtures / "llama-gqa", tmp_path / "llama"))


# What works


def test_generated_tokens_are_the_oracles(fixtures):
    reference = np.load(fixtures / "llama-gqa" / "reference.npz")
    prompts = [" ".join(map(str, prompt)) for prompt in reference["prompts"]]
    result = run("generate", str(fixtures / "llama-gqa"), "--ids", *prompts, "--max-tokens", "16", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    completions = json.loads(result.stdout)["completions"]
    assert [c["tokens"] for c in completions] == reference["greedy"].tolist()
    assert [c["finish_reason"] for c in completions] == ["length", "length"]
    assert completions[0]["usage"] == {"prompt_tokens": 7, "completion_tokens": 16}


def test_streamed_text_is_the_generated_text(fixtures):
    model = str(fixtures / "llama-gqa")
    generated = json.loads(run("generate", model, "the river", "--max-tokens", "8", "--json").stdout)
    streamed = run("generate", model, "the river", "--max-tokens", "8")
    assert (streamed.exit_code, streamed.stderr) == (0, "")
    assert streamed.stdout == generated["completions"][0]["text"] + "\n"


def test_logprobs_and_a_seed_reach_the_model(fixtures):
    options = ["--temperature", "1", "--seed", "5", "--n", "2", "--logprobs", "3", "--max-tokens", "4", "--json"]
    first = json.loads(run("generate", str(fixtures / "llama-gqa"), "the river", *options).stdout)["completions"]
    again = json.loads(run("generate", str(fixtures / "llama-gqa"), "the river", *options).stdout)["completions"]
    assert [c["tokens"] for c in first] == [c["tokens"] for c in again]
    assert first[0]["tokens"] != first[1]["tokens"]
    entry = first[0]["logprobs"][0]
    assert entry["token"] == first[0]["tokens"][0]
    assert len(entry["top"]) == 3
    assert entry["logprob"] <= entry["top"][0][1] <= 0


def test_a_gguf_file_and_its_folder_agree(fixtures):
    prompt = ["--ids", "5 6 7", "--max-tokens", "6", "--json"]
    gguf = json.loads(run("generate", str(fixtures / "llama-gguf" / "f32.gguf"), *prompt).stdout)
    folder = json.loads(run("generate", str(fixtures / "llama-gqa"), *prompt).stdout)
    assert gguf["completions"][0]["tokens"] == folder["completions"][0]["tokens"]


def test_a_conversation_on_a_pipe(fixtures):
    result = run("chat", str(fixtures / "llama-gqa"), "--max-tokens", "3", stdin="7\n/reset\n7\n")
    assert result.exit_code == 0
    first, second = result.stdout[: len(result.stdout) // 2], result.stdout[len(result.stdout) // 2 :]
    assert first == second != ""


def test_vectors_are_the_oracles(fixtures, tmp_path):
    reference = np.load(fixtures / "bert-sentence" / "reference.npz")
    text = "".join(f"{line}\n" for line in reference["texts"])
    result = run("embed", str(fixtures / "bert-sentence"), "--out", str(tmp_path / "v.npy"), stdin=text)
    assert (result.exit_code, result.stdout) == (0, "")
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), reference["vectors"], atol=1e-5)


# What can't be served


@pytest.mark.parametrize("command", BAD_INPUT_COMMANDS)
def test_a_folder_that_is_no_checkpoint(command, tmp_path):
    error = one_line_error(run(command[0], str(tmp_path), *command[1:], stdin="1\n"))
    assert "has no config.json" in error
    assert "Supported: " in error


@pytest.mark.parametrize("command", ["inspect", "generate"])
def test_truncated_safetensors(command, llama):
    weights = llama / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in one_line_error(run(command, str(llama), stdin="1"))


@pytest.mark.parametrize("command", ["inspect", "generate"])
def test_truncated_gguf(command, fixtures, tmp_path):
    data = (fixtures / "llama-gguf" / "f32.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: len(data) // 2])
    assert "cut.gguf" in one_line_error(run(command, str(tmp_path / "cut.gguf"), stdin="1"))


def test_a_file_that_is_no_checkpoint(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    assert "not a checkpoint in a known format" in one_line_error(run("inspect", str(tmp_path / "notes.txt")))


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_an_unknown_architecture_lists_the_supported_ones(llama):
    change_config(llama, model_type="mamba")
    assert "'mamba' is not supported; supported: bert, llama" in one_line_error(run("generate", str(llama), "hi"))


def test_an_unknown_config_key_is_named(llama):
    change_config(llama, attention_sinks=4)
    assert "attention_sinks" in one_line_error(run("generate", str(llama), "hi"))


def test_an_empty_prompt(fixtures):
    assert "at least 1 token" in one_line_error(run("generate", str(fixtures / "llama-gqa"), ""))


def test_a_prompt_longer_than_the_context(fixtures):
    prompt = " ".join(["5"] * 64)
    error = one_line_error(run("generate", str(fixtures / "llama-gqa"), "--ids", prompt))
    assert "64 tokens" in error


def test_a_max_len_over_the_checkpoints(fixtures):
    error = one_line_error(run("generate", str(fixtures / "llama-gqa"), "hi", "--max-len", "65"))
    assert "65" in error
    assert "64" in error


@pytest.mark.parametrize("ids", ["5 320", "-1"])
def test_token_ids_out_of_range(fixtures, ids):
    error = one_line_error(run("generate", str(fixtures / "llama-gqa"), "--ids", "--", ids))
    assert "out of range" in error
    assert "320" in error


@pytest.mark.parametrize(
    ("option", "value"),
    [("--max-tokens", "0"), ("--temperature", "-1"), ("--top-p", "1.5"), ("--n", "0"), ("--dtype", "float8")],
)
def test_an_option_out_of_range_is_named(fixtures, option, value):
    error = one_line_error(run("generate", str(fixtures / "llama-gqa"), "hi", option, value))
    assert option.removeprefix("--").replace("-", "_") in error


def test_nan_in_a_weight_is_found_with_check(llama):
    path = llama / "model.safetensors"
    data = bytearray(path.read_bytes())
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    start = 8 + struct.unpack("<Q", data[:8])[0] + header["model.norm.weight"]["data_offsets"][0]
    data[start : start + 4] = struct.pack("<f", float("nan"))
    path.write_bytes(data)
    assert "model.norm.weight" in one_line_error(run("generate", str(llama), "hi", "--check"))


def test_a_model_without_tokenizer_says_to_give_ids(fixtures):
    assert "token ids" in one_line_error(run("generate", str(fixtures / "llama-tied"), "hi"))
    assert "token ids" in one_line_error(run("chat", str(fixtures / "llama-tied"), stdin="hi\n"))


def test_an_encoder_is_no_language_model(fixtures):
    error = one_line_error(run("generate", str(fixtures / "bert-sentence"), "hi"))
    assert "use jaxinfer embed" in error
