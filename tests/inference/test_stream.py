"""Reading and writing one sequence: what comes back always agrees with itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from roost.config import PRESETS, ModelConfig
from roost.inference.sampling import Sampling
from roost.inference.stream import Completion, Stream, generate, read, stream
from roost.models.rwkv import RWKV
from roost.state import State
from roost.tokenizer import WorldTokenizer
from tiny import tiny_model

BYTES = WorldTokenizer.byte_level()
WORLD = WorldTokenizer()
MODEL = tiny_model()
GREEDY = Sampling(temperature=0.0)


class Scripted(RWKV):
    """Says one id after the other, whatever it reads; its state is the list of what it has read (in att_shift)."""

    def __init__(self, script: Sequence[int], vocab: int = 65536, interrupt_at: int = -1) -> None:
        super().__init__(ModelConfig("finch", 1, 64, vocab_size=vocab), device="meta")
        self.script, self.prompt, self.interrupt_at = list(script), -1, interrupt_at

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if "script" in vars(self) else "meta")  # nothing is initialised

    def forward(self, tokens: Any = None, state: State | None = None, **rest: Any) -> tuple[Tensor, State]:
        before = [] if state is None else heard(state)
        if self.prompt < 0:
            self.prompt = tokens.shape[1]
        seen = before + tokens[0].tolist()
        step = len(seen) - self.prompt
        if step == self.interrupt_at:
            self.interrupt_at = -1
            raise KeyboardInterrupt
        logits = torch.zeros(1, 1, self.config.vocab_size)
        logits[0, 0, self.script[step] if 0 <= step < len(self.script) else 0] = 50.0
        layer = State.zeros(self.config).layers[0]._replace(att_shift=torch.tensor([seen], dtype=torch.float32))
        return logits, State((layer,), (len(seen),))


def heard(state: State) -> list[int]:
    return [int(id) for id in state.layers[0].att_shift[0]]


def check(model: Scripted, found: Completion, prompt: list[int], tokenizer: WorldTokenizer = WORLD) -> None:
    """The invariant: the state has read the prompt and the tokens, and the tokens are the text."""
    assert heard(found.state) == prompt + list(found.tokens)
    assert tokenizer.decode(found.tokens) == found.text
    assert found.state.tokens == (len(prompt) + len(found.tokens),)


def test_read_in_chunks_equals_the_whole() -> None:
    tokens = BYTES.encode("In the beginning was the Word, und das Wort war bei Gott.")
    logits, state = MODEL(torch.tensor([tokens]))
    for chunk in (1, 7, 1000):
        calls: dict[int, int] = {}
        found, after = read(MODEL, tokens, chunk=chunk, progress=calls.__setitem__)
        torch.testing.assert_close(found, logits[0, -1], atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(after.layers[-1].wkv, state.layers[-1].wkv, atol=2e-5, rtol=2e-5)
        assert after.tokens == (len(tokens),) and not found.requires_grad
        assert list(calls.items())[-1] == (len(tokens), len(tokens)) and len(calls) == -(-len(tokens) // chunk)
    with pytest.raises(ValueError, match="no tokens to read"):
        read(MODEL, [])
    with pytest.raises(ValueError, match="chunk is 0"):
        read(MODEL, [1], chunk=0)


@pytest.mark.parametrize("name", ["dove-tiny", "eagle-tiny", "finch-tiny"])
def test_greedy_text_is_what_the_model_says(name: str) -> None:
    model = tiny_model(name)
    found = generate(model, BYTES, "Once", Sampling(temperature=0.0, stop_ids=()), max_tokens=30)
    ids = BYTES.encode("Once")
    for _ in range(30):
        logits, state = model(torch.tensor([ids]))
        logits[0, -1, 0] = -torch.inf
        ids.append(int(logits[0, -1].argmax()))
    assert list(found.tokens) == ids[4:]
    assert (found.finish_reason, found.usage.prompt_tokens, found.usage.completion_tokens) == ("length", 4, 30)
    logits, state = model(torch.tensor([ids]))
    torch.testing.assert_close(found.logits, logits[0, -1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.state.layers[1].wkv, state.layers[1].wkv, atol=1e-4, rtol=1e-4)
    assert found.state.fingerprint == model.fingerprint


def test_prompt_may_be_text_bytes_or_ids() -> None:
    found = [generate(MODEL, BYTES, p, GREEDY, max_tokens=5).tokens for p in ("ß", b"\xc3\x9f", [196, 160])]
    assert found[0] == found[1] == found[2]


def test_seed_decides_and_is_reported() -> None:
    def run(seed: int | None) -> Completion:
        return generate(MODEL, BYTES, "a", Sampling(seed=seed, stop_ids=()), max_tokens=20)

    torch.manual_seed(1)
    one = run(None)
    torch.manual_seed(1)
    assert run(None).tokens != one.tokens
    assert run(one.seed).tokens == one.tokens
    assert run(3).tokens == run(3).tokens != run(4).tokens


def test_writing_on_with_logits_is_writing_at_once() -> None:
    params = Sampling(temperature=0.0, stop_ids=())
    whole = generate(MODEL, BYTES, "abc", params, max_tokens=12)
    part = generate(MODEL, BYTES, "abc", params, max_tokens=5)
    rest = generate(MODEL, BYTES, "", params, max_tokens=7, state=part.state, logits=part.logits)
    assert part.tokens + rest.tokens == whole.tokens
    assert rest.usage.prompt_tokens == 0
    assert generate(MODEL, BYTES, "", params, max_tokens=3).usage.prompt_tokens == 1  # the document boundary
    with pytest.raises(ValueError, match="a state alone does not say what comes next"):
        stream(MODEL, BYTES, "", params, state=part.state)
    with pytest.raises(ValueError, match=r"\(3,\) instead of \(257,\)"):
        stream(MODEL, BYTES, b"", params, state=part.state, logits=torch.zeros(3))


def test_states_are_never_changed() -> None:
    _, state = read(MODEL, BYTES.encode("shared beginning"))
    before = [tensor.clone() for layer in state.layers for tensor in layer]
    for seed in range(2):
        generate(MODEL, BYTES, "x", Sampling(seed=seed), state=state, max_tokens=5)
    assert all(torch.equal(a, b) for a, b in zip(before, (t for layer in state.layers for t in layer), strict=True))


STRADDLING = [*WORLD.encode("Hello there"), 3336, *WORLD.encode("User")]  # 3336 is " \n\n"


def test_stop_string_inside_a_token_cuts_the_token_and_the_state() -> None:
    data = WORLD.token_bytes(3336)
    keep = data[: data.index(b"\n\n")]
    for stop in (("\n\n",), ("\n\nUser", "nothing")):
        model = Scripted(STRADDLING)
        found = generate(model, WORLD, [5, 6], Sampling(temperature=0.0, stop=stop))
        assert found.text == "Hello there" + keep.decode() and found.finish_reason == "stop"
        check(model, found, [5, 6])
        assert found.usage.completion_tokens == len(STRADDLING) - (stop == ("\n\n",)) * len(WORLD.encode("User"))


def test_text_held_for_a_stop_string_comes_when_the_match_fails_or_the_text_ends() -> None:
    ids = WORLD.encode("one\n\nUs two\n\nUs")
    model = Scripted(ids)
    running = stream(model, WORLD, [5], Sampling(temperature=0.0, stop=("\n\nUser",)))
    pieces = list(running)
    assert "".join(pieces) == "one\n\nUs two\n\nUs" and "\n\nUs two" in pieces and pieces[-1] == "\n\nUs"
    assert running.result.finish_reason == "stop" and "" not in pieces  # id 0 ended it
    check(model, running.result, [5])


@settings(max_examples=60)
@given(
    text=st.text("ab\n😀é", max_size=12),
    stop=st.lists(st.text("ab\n😀é", min_size=1, max_size=3), max_size=2),
    limit=st.integers(0, 14),
    close_after=st.integers(0, 6) | st.none(),
)
def test_invariant_under_stop_strings_limits_and_closing(
    text: str, stop: list[str], limit: int, close_after: int | None
) -> None:
    for tokenizer, vocab in ((WORLD, 65536), (BYTES, 257)):
        ids = tokenizer.encode(text)
        model = Scripted(ids, vocab)
        params = Sampling(temperature=0.0, stop=tuple(stop))
        running = stream(model, tokenizer, [5, 7], params, max_tokens=limit)
        pieces: list[str] = []
        for piece in running:
            assert piece
            pieces.append(piece)
            if len(pieces) == close_after:
                break
        found = running.close()
        assert found is running.result is running.close()
        assert found.text == "".join(pieces)
        check(model, found, [5, 7], tokenizer)
        assert not any(word in found.text for word in stop)
        written = tokenizer.decode(ids[:limit])
        if close_after is None:
            matches = [(written.index(word) + len(word), written.index(word)) for word in stop if word in written]
            assert found.text == written[: min(matches)[1] if matches else None]
            assert found.finish_reason == ("stop" if matches or len(ids) < limit else "length")
        assert "\ufffd" not in "".join(pieces[:-1])


def test_half_characters_are_held_and_the_tail_is_not_lost() -> None:
    smile, broken = [3319, 2417], [256, 19232]  # F0 9F | 99 82; a byte that is no text, a genuine U+FFFD
    model = Scripted([*smile, *broken, *smile, 3319])
    running = stream(model, WORLD, [5], Sampling(temperature=0.0), max_tokens=7)
    assert list(running) == ["🙂", "\ufffd", "\ufffd", "🙂", "\ufffd"]
    check(model, running.result, [5])
    assert running.result.tokens == (*smile, *broken, *smile, 3319)

    model = Scripted([*smile, *smile])
    running = stream(model, WORLD, [5], Sampling(temperature=0.0))
    assert next(running) == "🙂"
    found = running.close()
    assert (found.text, found.tokens, found.finish_reason) == ("🙂", tuple(smile), "closed")


@pytest.mark.parametrize("interrupt_at", range(1, 7))
def test_ctrl_c_anywhere_leaves_a_consistent_result(interrupt_at: int) -> None:
    ids = WORLD.encode("Hi\n\nUs🙂 there")
    model = Scripted(ids, interrupt_at=interrupt_at)
    running = stream(model, WORLD, [5], Sampling(temperature=0.0, stop=("\n\nUser",)))
    pieces: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        pieces.extend(running)
    found = running.close()
    assert found.finish_reason == "closed" and WORLD.decode(ids).startswith(found.text)
    check(model, found, [5])


def test_result_waits_for_the_end() -> None:
    running = stream(MODEL, BYTES, "a", GREEDY)
    with pytest.raises(ValueError, match="not finished"):
        _ = running.result
    assert isinstance(running, Stream) and isinstance(running, Iterator)
    found = running.close()
    assert (found.text, found.tokens, found.usage.completion_tokens) == ("", (), 0)
    assert list(running) == []


def test_stop_ids_are_drawn_only_when_asked_for_and_never_read() -> None:
    model = Scripted([100, 0, 200])
    found = generate(model, WORLD, [5], GREEDY)
    assert (found.tokens, found.finish_reason, found.usage.completion_tokens) == ((100,), "stop", 2)
    check(model, found, [5])
    flat = Scripted([0, 65530, 100, 0])  # without leave, ids without bytes are masked and the lowest other id wins
    assert generate(flat, WORLD, [5], Sampling(temperature=0.0, stop_ids=()), max_tokens=4).tokens == (1, 1, 100, 1)
    late = generate(Scripted([0, 0, 0]), WORLD, [5], Sampling(temperature=0.0, min_tokens=2))
    assert late.tokens == (1, 1) and late.finish_reason == "stop"


def test_penalties_count_what_was_written_here() -> None:
    flat = Scripted([], vocab=257)
    flat.forward = lambda tokens=None, state=None, **rest: (torch.zeros(1, 1, 257), State.zeros(flat.config))  # type: ignore[method-assign]
    free = Sampling(temperature=0.0, stop_ids=())
    assert generate(flat, BYTES, [1, 2], free, max_tokens=3).tokens == (1, 1, 1)
    pushed = Sampling(temperature=0.0, stop_ids=(), presence=1.0)
    assert generate(flat, BYTES, [1, 2], pushed, max_tokens=3).tokens == (1, 2, 3)
    spared = Sampling.chatrwkv(temperature=0.0, stop_ids=(), presence=0.0, bans=tuple(range(1, 49)))
    assert generate(flat, BYTES, [1], spared, max_tokens=3).tokens == (49, 49, 49)  # "0" is not counted


def test_logprobs_are_of_the_raw_logits_and_follow_the_text() -> None:
    params = Sampling(temperature=0.7, seed=1, top_p=0.5, logprobs=2, stop_ids=())
    found = generate(MODEL, BYTES, "abc", params, max_tokens=6)
    ids = BYTES.encode("abc")
    assert len(found.logprobs) == 6
    for token, entry in zip(found.tokens, found.logprobs, strict=True):
        expected = torch.log_softmax(read(MODEL, ids)[0], 0)
        assert entry.token.id == token and entry.token.bytes == bytes([token - 1])
        assert entry.token.logprob == pytest.approx(float(expected[token]), abs=1e-4)
        assert [e.id for e in entry.top] == expected.topk(2).indices.tolist()
        ids.append(token)
    cut = generate(Scripted(STRADDLING), WORLD, [5], Sampling(temperature=0.0, stop=("\n\n",), logprobs=1))
    assert len(cut.logprobs) == len(WORLD.encode("Hello there"))
    assert generate(MODEL, BYTES, "a", GREEDY, max_tokens=2).logprobs == ()


def test_bad_calls_say_what_to_do() -> None:
    bad: list[tuple[str, Any, dict[str, Any]]] = [
        ("max_tokens is -1", GREEDY, {"max_tokens": -1}),
        ("bans holds 257, but the model has only 257", Sampling(bans=(257,)), {}),
        ("stop_ids holds 300", Sampling(stop_ids=(300,)), {}),
        ("chunk is -5", GREEDY, {"chunk": -5}),
        ("the state has 2 row", GREEDY, {"state": State.zeros(MODEL.config, 2)}),
        ("other sizes", GREEDY, {"state": State.zeros(PRESETS["dove-tiny"])}),
        ("made by another model", GREEDY, {"state": State.zeros(MODEL.config, 1, fingerprint="f" * 64)}),
    ]
    for message, params, rest in bad:
        with pytest.raises(ValueError, match=message):
            stream(MODEL, BYTES, "a", params, **rest)
    with pytest.raises(ValueError, match="this tokenizer has 65536 ids, the model only 257"):
        stream(MODEL, WORLD, "a")
    with pytest.raises(ValueError, match="token id 999 is outside"):
        stream(MODEL, BYTES, [1, 999])
    with pytest.raises(ValueError, match="lone surrogate"):
        stream(MODEL, BYTES, "\ud800")


def test_zero_and_huge_max_tokens_and_odd_bytes() -> None:
    nothing = generate(MODEL, BYTES, b"\x00\xff\x00", GREEDY, max_tokens=0)
    assert (nothing.text, nothing.finish_reason, nothing.usage.prompt_tokens) == ("", "length", 3)
    assert generate(Scripted([100]), WORLD, "a\x00", GREEDY, max_tokens=10**18).text == WORLD.decode([100])
