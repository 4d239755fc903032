"""``tokenry batch``."""

import json

import pytest
import torch
from typer.testing import CliRunner

from tokenry.assets import load_model
from tokenry.cli import app
from tokenry.cli.main import run

pytestmark = pytest.mark.method("batchllm")
runner = CliRunner()
STORY = "The harbour lay quiet under the morning sun, and the old captain "


@pytest.fixture
def call(tmp_path):
    def batch(*lines, more=(), out="out.jsonl"):
        file = tmp_path / "requests.jsonl"
        file.write_text(
            "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n", "utf-8"
        )
        arguments = [file, "--out", tmp_path / out, "--model", "draft", "--memory", "50MB", *more]
        return runner.invoke(app, ["batch", *map(str, arguments)])

    return batch


def answers(tmp_path):
    return {entry["id"]: entry for entry in map(json.loads, (tmp_path / "out.jsonl").read_text("utf-8").splitlines())}


GOOD = [
    {"id": "a", "prompt": STORY + "spoke", "max_new_tokens": 5},
    {"id": "b", "prompt": STORY + "slept"},
    {"ids": [70, 71, 72]},
]


def test_texts_of_generate(call, tmp_path):
    done = call(*GOOD, more=["--max-new-tokens", 7])
    assert done.exit_code == 0, done.output
    assert "3 requests written" in " ".join(done.stdout.split())
    assert "prompt tokens computed" in " ".join(done.stdout.split())
    model, tokenizer = load_model("draft")
    found = answers(tmp_path)
    for name, ids, new in (
        ("a", tokenizer(GOOD[0]["prompt"])["input_ids"], 5),
        ("b", tokenizer(GOOD[1]["prompt"])["input_ids"], 7),
        (3, GOOD[2]["ids"], 7),
    ):
        given = torch.tensor([ids])
        out = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=new, do_sample=False)[0]
        assert found[name]["ids"] == out[len(ids) :].tolist()
        assert found[name]["text"] == tokenizer.decode(found[name]["ids"], skip_special_tokens=True)
        assert found[name]["prompt_tokens"] == len(ids)


def test_broken_lines_are_named_and_the_rest_runs(call, tmp_path):
    broken = {
        '{"prompt": ': "not JSON",
        "[1, 2]": "not an object",
        '{"prompt": "x", "ids": [1]}': 'either "prompt" (text) or "ids"',
        '{"prompt": 5}': '"prompt" must be text',
        '{"prompt": ""}': "the prompt has no tokens",
        '{"ids": [1, "2"]}': "list of whole numbers",
        '{"ids": [999999]}': "token 999999 is not in the model's vocabulary",
        '{"prompt": "x", "max_new_tokens": 0}': "at least 1, got 0",
        '{"prompt": "x", "max_new_tokens": 9999999}': "--memory 50MB holds",
        '{"prompt": "x", "id": [1]}': '"id" must be text or a whole number',
        '{"prompt": "x", "temperature": 1}': "unknown field 'temperature'",
        '{"prompt": "x", "id": "a"}': "id 'a' is given twice",
    }
    done = call(GOOD[0], *broken, "", GOOD[2], more=["--max-new-tokens", 3, "--json"])
    assert done.exit_code == 1
    summary = json.loads(done.stdout)
    assert len(summary["broken"]) == len(broken)
    for number, (said, expected) in enumerate(zip(summary["broken"], broken.values(), strict=True), 2):
        assert said.startswith(f"line {number}: ") and expected in said
        assert expected in " ".join(done.stderr.split())
    assert set(answers(tmp_path)) == {"a", len(broken) + 3}


def test_goes_on_after_a_kill(call, tmp_path):
    out = tmp_path / "out.jsonl"
    assert call(*GOOD, more=["--max-new-tokens", 4]).exit_code == 0
    whole = answers(tmp_path)
    lines = out.read_text("utf-8").splitlines(keepends=True)
    out.write_text(lines[0] + lines[1][:9], "utf-8")  # killed while writing the second answer
    done = call(*GOOD, more=["--max-new-tokens", 4, "--json"])
    summary = json.loads(done.stdout)
    assert (summary["requests"], summary["finished_before"]) == (2, 1)
    assert answers(tmp_path) == whole
    again = json.loads(call(*GOOD, more=["--json"]).stdout)
    assert (again["requests"], again["finished_before"]) == (0, 3)
    assert answers(tmp_path) == whole


@pytest.mark.parametrize(
    ("lines", "more", "says"),
    [
        ([" "], [], "has no lines"),
        ([GOOD[2]], ["--memory", "lots"], "such as '8GiB'"),
        ([GOOD[2]], ["--dtype", "int8"], "--dtype must be"),
        ([GOOD[2]], ["--model", "no-such-model"], "cannot load a causal language model"),
    ],
)
def test_mistakes_are_one_sentence(call, monkeypatch, capsys, lines, more, says):
    with monkeypatch.context() as patched:
        patched.setattr(runner, "invoke", lambda app, arguments: arguments)
        arguments = call(*lines, more=more)
    monkeypatch.setattr("sys.argv", ["tokenry", *arguments])
    with pytest.raises(SystemExit) as stopped:
        run()
    error = " ".join(capsys.readouterr().err.split())
    assert stopped.value.code == 2 and says in error and "Traceback" not in error


@pytest.mark.parametrize("text", ["dear diary\n", "dear diary", "[1]\n", '{"id": 1}\ndear diary'])
def test_does_not_write_into_another_file(call, tmp_path, text):
    (tmp_path / "out.jsonl").write_text(text, "utf-8")
    done = call(GOOD[2])
    assert isinstance(done.exception, ValueError) and "holds something else" in str(done.exception)
    assert (tmp_path / "out.jsonl").read_text("utf-8") == text


def test_does_not_write_into_the_requests(call, tmp_path):
    done = call(GOOD[0], out="requests.jsonl")
    assert isinstance(done.exception, ValueError) and "is the file of the requests" in str(done.exception)
    assert json.loads((tmp_path / "requests.jsonl").read_text("utf-8")) == GOOD[0]


def test_a_folder_for_the_answers_is_made_and_none_is_taken_for_a_file(call, tmp_path):
    assert call(GOOD[2], more=["--max-new-tokens", 2], out="new/folder/out.jsonl").exit_code == 0
    assert (tmp_path / "new/folder/out.jsonl").read_text("utf-8").count("\n") == 1
    done = call(GOOD[2], out="new")
    assert isinstance(done.exception, ValueError) and "is a folder; name a file in it" in str(done.exception)


def test_a_request_beyond_learned_positions_stops_no_other(call, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 4096}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path / "model")
    load_model("draft")[1].save_pretrained(tmp_path / "model")
    lines = [
        {"id": "long", "ids": [5] * 30, "max_new_tokens": 10},
        {"id": "fits", "ids": [5] * 20, "max_new_tokens": 3},
    ]
    done = call(*lines, more=["--model", tmp_path / "model"])
    assert done.exit_code == 1 and "reaches 39 tokens, the model has 32 positions" in " ".join(done.stderr.split())
    assert set(answers(tmp_path)) == {"fits"}
