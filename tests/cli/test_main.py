"""The command line: every verb, every way to get it wrong in one line."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import make_checkpoint
from commands import error
from roost import cli
from roost.checkpoint import load
from roost.cli import main, verbs
from roost.evaluation.loss import bits_per_byte
from roost.inference.sampling import Sampling
from roost.inference.stream import generate, read
from roost.state import State
from roost.tokenizer import WorldTokenizer
from tiny import tiny_model

BYTES = WorldTokenizer.byte_level()
PLAIN = {"presence": 0.0, "frequency": 0.0}  # what a model of bytes gets without --preset


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny checkpoint file."""
    path = tmp_path_factory.mktemp("model") / "tiny.pth"
    tiny_model().save(path)
    return str(path)


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_generate_writes_what_the_library_writes(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", model, "Héllo", "--seed", "3", "--max-tokens", "12", "--temperature", "0.8"]) == 0
    network, _ = load(model)
    expected = generate(network, BYTES, "Héllo", Sampling.chatrwkv(seed=3, temperature=0.8, **PLAIN), max_tokens=12)
    assert capsys.readouterr().out == expected.text + "\n"


def test_generate_json_state_and_flags_in_any_order(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = str(tmp_path / "a.state"), str(tmp_path / "b.state")
    flags = ["--preset", "openai", "--temperature", "0", "--max-tokens", "6", "--json", "--logprobs", "2"]
    assert main(["generate", model, *flags, "--save", first, "ab"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert main(["generate", model, "--state", first, *flags, "--save", second, "cd"]) == 0
    two = json.loads(capsys.readouterr().out)
    network, _ = load(model)
    params = Sampling.openai(temperature=0.0)
    expected = generate(network, BYTES, "ab", params, max_tokens=6)
    assert one["tokens"] == list(expected.tokens) and one["usage"] == {"prompt_tokens": 2, "completion_tokens": 6}
    assert len(one["logprobs"]) == 6 and len(one["logprobs"][0]["top"]) == 2
    more = generate(network, BYTES, "cd", params, max_tokens=6, state=expected.state)
    assert two["text"] == more.text and two["finish_reason"] == "length"
    assert torch.equal(State.load(second).layers[0].wkv, more.state.layers[0].wkv)


def test_generate_from_standard_input_and_from_nothing(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stdin(monkeypatch, b"a\x00\xff")
    fixed = ["--temperature", "0", "--max-tokens", "4"]
    assert main(["generate", model, "-", *fixed]) == 0
    network, _ = load(model)
    greedy = Sampling.chatrwkv(temperature=0.0, **PLAIN)
    assert capsys.readouterr().out == generate(network, BYTES, b"a\x00\xff", greedy, max_tokens=4).text + "\n"
    assert main(["generate", model, *fixed]) == 0
    assert capsys.readouterr().out == generate(network, BYTES, "", greedy, max_tokens=4).text + "\n"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Sampling]:
    """The parameters that reach `stream`, which then fails."""
    params: list[Sampling] = []

    def spy(*args: Any, **rest: Any) -> Any:
        params.append(args[3])
        raise ValueError("enough")

    monkeypatch.setattr(verbs, "stream", spy)
    return params


def test_every_sampling_flag_arrives(model: str, seen: list[Sampling]) -> None:
    given = ["--top-p", "0.3", "--top-k", "5", "--min-p", "0.1", "--presence", "0.4", "--frequency", "0.5"]
    given += ["--penalty-decay", "0.9", "--ban", "7", "--ban", "8", "--stop", r"\n\nUser", "--stop", "x", "--seed", "2"]
    assert main(["generate", model, "x", *given]) == 2
    assert seen == [
        Sampling.chatrwkv(
            top_p=0.3,
            top_k=5,
            min_p=0.1,
            presence=0.4,
            frequency=0.5,
            penalty_decay=0.9,
            bans=(7, 8),
            stop=("\n\nUser", "x"),
            seed=2,
        )
    ]


def test_penalties_of_the_preset(model: str, seen: list[Sampling]) -> None:
    for flags in ([], ["--preset", "chatrwkv"], ["--presence", "0.4"]):
        main(["generate", model, "x", *flags])
    assert [(params.presence, params.frequency) for params in seen] == [(0.0, 0.0), (0.2, 0.2), (0.4, 0.0)]


def test_ctrl_c_during_generate_keeps_the_state(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = cli.verbs.stream

    def stopping(*args: Any, **rest: Any) -> Any:
        running = original(*args, **rest)
        step, count = running._step, iter(range(100))

        def limited() -> str:
            if next(count) == 5:
                raise KeyboardInterrupt
            return step()

        running._step = limited
        return running

    monkeypatch.setattr(verbs, "stream", stopping)
    file = tmp_path / "s.state"
    argv = ["generate", model, "abc", "--temperature", "0", "--ban", "0", "--save", str(file), "--json"]
    assert main(argv) == 130
    found = json.loads(capsys.readouterr().out)
    assert found["finish_reason"] == "closed" and State.load(file).tokens == (3 + len(found["tokens"]),)


def test_read_saves_scores_and_reports(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, plain, scored = tmp_path / "t.txt", tmp_path / "a.state", tmp_path / "b.state"
    text.write_bytes(b"any bytes: \x00 \xff \xc3\n" * 40)
    assert main(["read", model, str(text), "--save", str(plain), "--chunk", "100"]) == 0
    out = capsys.readouterr().out
    assert f"{text.stat().st_size:,} tokens ({text.stat().st_size:,} bytes)" in out and str(plain) in out
    network, _ = load(model)
    _, state = read(network, BYTES.encode(text.read_bytes()), chunk=100)
    assert torch.equal(State.load(plain).layers[2].wkv, state.layers[2].wkv)
    assert State.load(plain).fingerprint == network.fingerprint
    assert main(["read", model, str(text), "--score", "--save", str(scored), "--state", str(plain)]) == 0
    score = bits_per_byte(network, BYTES, text.read_bytes(), state)
    assert f"{score.bits_per_byte:.4f} bits per byte" in capsys.readouterr().out
    assert State.load(scored).tokens == (2 * text.stat().st_size + 1,)


def test_what_was_read_is_written_on_from(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, state = tmp_path / "t.txt", str(tmp_path / "s.state")
    text.write_text("It was a dark and stormy night")
    assert main(["read", model, str(text), "--save", state]) == 0
    capsys.readouterr()
    assert main(["generate", model, "; the", "--state", state, "--temperature", "0", "--max-tokens", "9"]) == 0
    whole = "It was a dark and stormy night; the"
    expected = generate(load(model)[0], BYTES, whole, Sampling.chatrwkv(temperature=0.0, **PLAIN), max_tokens=9)
    assert capsys.readouterr().out == expected.text + "\n"


def test_read_from_standard_input(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stdin(monkeypatch, b"xyz")
    assert main(["read", model, "-", "--score"]) == 0
    assert "3 tokens (3 bytes)" in capsys.readouterr().out


def test_info_and_convert(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", model]) == 0
    out = capsys.readouterr().out
    assert "RWKV-6" in out and "217,472" in out
    target = tmp_path / "m.safetensors"
    assert main(["convert", model, str(target), "--dtype", "bf16"]) == 0
    assert capsys.readouterr().out == f"wrote {target}\n"
    assert load(str(target))[0].dtype == torch.bfloat16


def test_warnings_of_the_library_are_one_line_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "one.pth"
    torch.save(make_checkpoint("6", n_layer=1), source)
    assert main(["convert", str(source), str(tmp_path / "two.pth")]) == 0
    err = capsys.readouterr().err
    assert err.startswith("roost: warning: ") and err.count("\n") == 1


def test_train_overrides_the_recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from roost.training import recipe
    from roost.training.loop import Progress

    seen: list[Any] = []

    def run_recipe(path: str, overrides: Any, *, resume: bool, device: str, progress: Any, notice: Any) -> Path:
        progress(Progress(1, 2, {"loss": 3.0, "lr": 1e-3, "tokens_per_second": 4.0}))
        seen.append((path, overrides, resume, device))
        return Path("runs/final.safetensors")

    monkeypatch.setattr(recipe, "run_recipe", run_recipe)
    assert main(["train", "a.toml", "--set", "steps=3", "--set", "out=runs/x", "--set", "lr=1e-3", "--resume"]) == 0
    assert seen == [("a.toml", {"steps": 3, "out": "runs/x", "lr": 0.001}, True, "cpu")]
    assert "final.safetensors after step 1, loss 3.0000" in capsys.readouterr().out
    assert "KEY=VALUE" in error(capsys, "train", "a.toml", "--set", "steps")
    monkeypatch.undo()
    assert "no recipe at nowhere.toml" in error(capsys, "train", "nowhere.toml")


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    import roost

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"roost {roost.__version__}\n"
    for argv in ([], ["--help"]):
        assert main(argv) == 0
        out = capsys.readouterr().out
        assert all(name in out for name in cli.VERBS)
    for name in cli.VERBS:
        assert main([name, "--help"]) == 0
        assert f"roost {name}" in capsys.readouterr().out


def test_wrong_words_name_the_nearest(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no command 'genrate'; did you mean 'generate'?" in error(capsys, "genrate")
    assert "did you mean --version?" in error(capsys, "--vresion")
    assert "no option --top_p; did you mean --top-p?" in error(capsys, "generate", model, "--top_p", "x")
    assert "no option --sav=x; did you mean --save?" in error(capsys, "read", model, "f", "--sav=x")
    assert "unexpected argument 'c'" in error(capsys, "generate", model, "b", "c")
    assert "required: MODEL" in error(capsys, "generate")
    assert "invalid choice: 'fp31'" in error(capsys, "generate", model, "--dtype", "fp31")
    assert "--seed: invalid int value: 'x'" in error(capsys, "generate", model, "--seed", "x")


def test_bad_input_is_one_line(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, text, other = tmp_path / "empty", tmp_path / "text", tmp_path / "other.state"
    empty.write_bytes(b"")
    text.write_text("text")
    State.zeros(tiny_model("eagle-tiny").config, fingerprint="f" * 64).save(other)
    save = str(tmp_path / "s.state")
    generate_, read_ = ("generate", model, "x"), ("read", model)
    cases: list[tuple[str, tuple[str, ...]]] = [
        ("max_tokens is -1", (*generate_, "--max-tokens", "-1")),
        ("temperature is -1.0", (*generate_, "--temperature", "-1")),
        ("top_p is nan", (*generate_, "--top-p", "nan")),
        ("seed is -1", (*generate_, "--seed", "-1")),
        ("logprobs is -1", (*generate_, "--logprobs", "-1")),
        ("an id in bans is -3", (*generate_, "--ban", "-3")),
        ("bans holds 999", (*generate_, "--ban", "999")),
        ("stop holds ''", (*generate_, "--stop", "")),
        ("no state file", (*generate_, "--state", str(tmp_path / "none"))),
        ("not a readable state file", (*generate_, "--state", str(text))),
        ("made by another model", (*generate_, "--state", str(other))),
        ("does not exist", (*generate_, "--save", str(tmp_path / "no" / "s"))),
        ("it is a directory", (*generate_, "--save", str(tmp_path))),
        ("no such file", (*read_, str(tmp_path / "none"), "--save", save)),
        ("is a directory", (*read_, str(tmp_path), "--save", save)),
        ("is empty", (*read_, str(empty), "--save", save)),
        ("what for?", (*read_, str(text))),
        ("chunk is 0", (*read_, str(text), "--save", save, "--chunk", "0")),
        ("chunk is 0", (*read_, str(text), "--score", "--chunk", "0")),
        ("nestling", ("generate", "nestlign", "x")),
        ("none.pth", ("info", str(tmp_path / "none.pth"))),
        ("--tokens is 0", ("verify", model, "--tokens", "0")),
        ("only", ("verify", model, "--tokens", "99999999")),
    ]
    for message, argv in cases:
        assert message in error(capsys, *argv), argv
    assert not Path(save).exists()


def test_a_state_needs_a_prompt(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "s.state")
    assert main(["generate", model, "x", "--max-tokens", "1", "--save", file]) == 0
    capsys.readouterr()
    assert "a state alone does not say what comes next" in error(capsys, "generate", model, "--state", file)


def test_a_model_without_a_known_vocabulary_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pile.pth"
    torch.save(make_checkpoint("6", vocab=300), file)
    assert "300 tokens, which is no World vocabulary" in error(capsys, "generate", str(file), "x")


def test_a_space_at_the_end_of_a_world_prompt_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "world.pth"
    torch.save(make_checkpoint("6", vocab=65536), file)
    assert main(["generate", str(file), "User: hi\n\nAssistant: ", "--max-tokens", "1"]) == 0
    assert "ends in a space" in capsys.readouterr().err


def test_debug_shows_where_and_bugs_are_named(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_args: Any, **_rest: Any) -> Any:
        raise RuntimeError("two\nlines")

    with pytest.raises(ValueError, match="max_tokens"):
        main(["generate", model, "x", "--max-tokens", "-1", "--debug"])
    monkeypatch.setattr(verbs, "stream", broken)
    assert error(capsys, "generate", model, "x") == "RuntimeError: two lines (--debug shows where)"


def test_ctrl_c_is_130(model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_args: Any, **_rest: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(verbs, "stream", interrupted)
    assert main(["generate", model, "x"]) == 130
    assert capsys.readouterr() == ("", "")


def test_as_a_process(model: str, tmp_path: Path) -> None:
    """`python -m roost`: exit codes, one line on stderr, and a reader that goes away."""
    command = [sys.executable, "-m", "roost"]
    done = subprocess.run([*command, "generate", str(tmp_path / "no.pth")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    with subprocess.Popen(
        [*command, "generate", model, "x", "--max-tokens", "100000", "--ban", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as writer:
        assert writer.stdout and writer.stderr and writer.stdout.read(3)
        writer.stdout.close()
        complaints = writer.stderr.read()
    assert (writer.returncode, complaints) == (141, b"")
