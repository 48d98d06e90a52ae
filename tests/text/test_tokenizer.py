"""What is streamed is what a whole decode gives, for both kinds of tokenizers; chat templates; stops."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from model_server.errors import BadRequest, StartupError
from model_server.request import Detokenizer
from model_server.text.tokenizer import BYTE_OF_CHAR, UNBOUNDED, Text
from tests.support.small_tokenizers import CORPUS, byte_fallback, byte_level

KINDS = {"byte_fallback": byte_fallback, "byte_level": byte_level}
both = pytest.mark.parametrize("text", [kind() for kind in KINDS.values()], ids=KINDS)


@st.composite
def answers(draw, text: Text) -> list[int]:
    """Tokens of real text, torn and mixed with bytes, special tokens and ids that no token has."""
    vocab = text.tokenizer.get_vocab()
    raw = sorted(i for token, i in vocab.items() if token.startswith("<0x") or len(token) == 1)
    real = st.sampled_from(CORPUS).map(lambda line: text.tokenizer(line, add_special_tokens=False).input_ids)
    some = real.flatmap(lambda ids: st.tuples(st.integers(0, len(ids)), st.integers(0, len(ids)), st.just(ids)))
    parts = st.one_of(
        some.map(lambda cut: cut[2][min(cut[:2]) : max(cut[:2])]),
        st.lists(st.integers(0, len(vocab) + 3), max_size=6),
        st.lists(st.sampled_from(raw), max_size=6),
        st.text(max_size=4).map(lambda s: text.tokenizer(s, add_special_tokens=False).input_ids),
    )
    return [i for part in draw(st.lists(parts, max_size=6)) for i in part]


def whole(text: Text, ids: list[int]) -> str:
    """What Transformers makes of an answer, behind a letter that saves its first space from stripping."""
    letter = text.tokenizer.convert_tokens_to_ids("o")
    decoded = text.tokenizer.decode([letter, *ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return decoded.removeprefix("o")


def streamed(text: Text, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    stream: Detokenizer = text.stream(stop)
    return [*map(stream.push, ids), stream.flush()]


@both
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_increments_joined_are_the_whole_decode(text, data):
    ids = data.draw(answers(text))
    pieces = streamed(text, ids)
    assert "".join(pieces) == whole(text, ids) == text.decode(ids)


@both
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_every_increment_is_a_piece_of_the_whole_in_its_place(text, data):
    """So no piece can hold a U+FFFD that the whole does not, nor half of a character."""
    ids = data.draw(answers(text))
    stream, expected, so_far = text.stream(), whole(text, ids), ""
    for token_id in ids:
        so_far += stream.push(token_id)
        assert expected.startswith(so_far)


@both
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_only_the_space_stripped_from_the_start_differs_from_plain_decode(text, data):
    ids = data.draw(answers(text))
    plain = text.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert text.decode(ids) in (plain, " " + plain)


@both
@pytest.mark.parametrize("line", [*CORPUS, "🏳️‍🌈", "e\u0301", "\u202eשלום", "नमस्ते", "a\x00b", "\ufffd"])
def test_real_text_comes_back_whole(text, line):
    ids = text.tokenizer(line, add_special_tokens=False).input_ids
    space_put_in_front = " " if text is byte_fallback() else ""
    assert "".join(streamed(text, ids)) == space_put_in_front + line


def test_first_space_is_kept_so_that_prompt_and_answer_read_right():
    text = byte_fallback()
    ids = text.tokenizer("The meaning", add_special_tokens=False).input_ids
    assert text.decode(ids) == " The meaning"


def test_special_tokens_are_skipped_and_do_not_end_a_run_of_bytes():
    text = byte_fallback()
    emoji = [text.tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "🚀".encode()]
    eos = text.tokenizer.eos_token_id
    assert text.decode([*emoji[:2], eos, *emoji[2:], eos]) == "🚀"


def test_character_torn_over_tokens_arrives_in_one_piece():
    text = byte_level()
    tokens = [next(c for c, b in BYTE_OF_CHAR.items() if b == byte) for byte in "🚀".encode()]
    assert streamed(text, text.tokenizer.convert_tokens_to_ids(tokens)) == ["", "", "", "🚀", ""]


@both
def test_endless_broken_bytes_are_not_held_back(text):
    raw = next(c for c, b in BYTE_OF_CHAR.items() if b == 0xFF) if text is byte_level() else "<0xFF>"
    stream = text.stream()
    assert [stream.push(text.tokenizer.convert_tokens_to_ids(raw)) for _ in range(50)] == ["\ufffd"] * 50


def test_byte_alphabet_is_the_tokenizers_own():
    assert set(BYTE_OF_CHAR) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTE_OF_CHAR.values()) == list(range(256))


def cut_at_first_stop(pieces: list[str], stop: tuple[str, ...]) -> tuple[str, bool]:
    """The plain way: after each piece, look for every stop string in all there is."""
    so_far = ""
    for piece in pieces:
        so_far += piece
        if found := [start for s in stop if (start := so_far.find(s)) >= 0]:
            return so_far[: min(found)], True
    return so_far, False


few_letters = st.text("ab o🎉", min_size=1, max_size=5)


@both
@settings(max_examples=200, deadline=None)
@given(lines=st.lists(few_letters, max_size=12), stop=st.lists(few_letters, min_size=1, max_size=4).map(tuple))
def test_text_ends_before_the_first_stop_string(text, lines, stop):
    ids = [i for line in lines for i in text.tokenizer(line, add_special_tokens=False).input_ids]
    stream = text.stream(stop)
    answer = "".join(map(stream.push, ids)) + stream.flush()
    assert (answer, stream.stopped) == cut_at_first_stop(streamed(text, ids), stop)


@settings(max_examples=150, deadline=None)
@given(line=st.text("ab", max_size=40), stop=st.text("ab", min_size=1, max_size=8))
def test_stop_string_that_repeats_itself_is_found_across_tokens(line, stop):
    text = byte_fallback()
    ids = text.tokenizer.convert_tokens_to_ids(list(line))
    assert "".join(streamed(text, ids, (stop,))) == line.split(stop)[0]


def test_only_a_possible_beginning_of_a_stop_string_is_held_back():
    text = byte_fallback()
    stream = text.stream(("old",))
    assert [stream.push(text.tokenizer.convert_tokens_to_ids(c)) for c in "hollo"] == ["h", "", "", "oll", ""]
    assert (stream.flush(), stream.stopped) == ("o", False)


def test_stopped_stream_gives_nothing_more():
    text = byte_fallback()
    stream = text.stream(("l",))
    given = [stream.push(text.tokenizer.convert_tokens_to_ids(c)) for c in "hello"]
    assert (given, stream.stopped, stream.flush()) == (["h", "e", "", "", ""], True, "")


def test_stop_string_completed_by_the_end_of_a_byte_run_stops():
    text = byte_fallback()
    ids = [text.tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "🚀".encode()]
    stream = text.stream(("🚀",))
    assert ("".join(map(stream.push, ids)), stream.flush(), stream.stopped) == ("", "", True)


@both
@settings(max_examples=100, deadline=None)
@given(prompt=st.text(max_size=30))
def test_encode_is_what_the_tokenizer_does(text, prompt):
    assert text.encode(prompt) == text.tokenizer(prompt).input_ids


@both
def test_half_a_surrogate_pair_is_refused_by_name(text):
    with pytest.raises(BadRequest, match="prompt must be valid Unicode") as caught:
        text.encode("\ud83d")
    assert caught.value.field == "prompt"


def test_truncation_saved_with_a_tokenizer_does_not_cut_prompts():
    backend = Tokenizer.from_str(byte_level().tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(4)
    assert len(Text(PreTrainedTokenizerFast(tokenizer_object=backend)).encode(CORPUS[0])) > 4


@both
@settings(max_examples=150, deadline=None)
@given(prompt=st.one_of(st.text(max_size=50), st.text(" \n\tthe日🎉", max_size=80), st.sampled_from(CORPUS)))
def test_no_prompt_is_longer_than_its_tokens_allow(text, prompt):
    assert len(prompt) <= text.max_prompt_chars(len(text.encode(prompt)))


@both
def test_length_bound_is_worth_asking(text):
    assert text.max_prompt_chars(4096) < 4096 * 64


def shrinking(**parts) -> Text:
    backend = Tokenizer.from_str(byte_fallback().tokenizer.backend_tokenizer.to_str())
    for name, part in parts.items():
        setattr(backend, name, part)
    return Text(PreTrainedTokenizerFast(tokenizer_object=backend))


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": normalizers.Replace(Regex(" {2,}"), " ")},
        {"normalizer": normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])},
        {"pre_tokenizer": pre_tokenizers.WhitespaceSplit()},
        {"pre_tokenizer": pre_tokenizers.Split(" ", "removed")},
        {"model": models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>", fuse_unk=True)},
        {"model": models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")},
    ],
    ids=str,
)
def test_tokenizer_that_may_swallow_text_has_no_length_bound(parts):
    assert shrinking(**parts).max_prompt_chars(1) == UNBOUNDED


def test_added_token_that_swallows_white_space_leaves_no_length_bound():
    text = shrinking()
    text.tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    assert text.max_prompt_chars(1) == UNBOUNDED


@both
def test_token_texts_of_a_plain_sentence_spell_it(text):
    ids = text.tokenizer(CORPUS[0], add_special_tokens=False).input_ids
    assert "".join(map(text.token_text, ids)).strip() == CORPUS[0]


@both
def test_special_token_reads_as_itself_and_a_missing_one_as_nothing(text):
    assert text.token_text(text.tokenizer.eos_token_id) == "</s>"
    assert text.token_text(len(text.tokenizer) + 5) == ""


def test_bytes_of_torn_characters_are_shown_and_given_as_bytes():
    text = byte_fallback()
    first = text.tokenizer.convert_tokens_to_ids("<0xF0>")
    assert (text.token_text(first), text.token_bytes(first)) == ("bytes:\\xf0", b"\xf0")


def test_token_text_keeps_its_space():
    text = byte_fallback()
    assert text.token_text(text.tokenizer.convert_tokens_to_ids("▁the")) == " the"


CHAT = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "日本語 🎉?"},
]


def test_chat_is_rendered_by_the_models_template():
    assert byte_fallback().render_chat(CHAT) == "<s>[INST] Hello [/INST]Hi!</s>[INST] 日本語 🎉? [/INST]"


def test_chat_is_encoded_as_transformers_does_with_one_bos():
    text = byte_fallback()
    prompt, ids = text.encode_chat(CHAT)
    assert ids == text.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert (prompt, ids.count(1)) == (text.render_chat(CHAT), 1)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "at least one"),
        ([CHAT[1]], "roles must alternate"),
        ([CHAT[0], CHAT[0]], "roles must alternate"),
        ([{"role": "user"}], "refuses them"),
        ([{"role": "user", "content": 5}], "cannot render"),
        ([{}], "refuses them"),
    ],
)
def test_messages_that_the_template_refuses_are_a_bad_request(messages, reason):
    with pytest.raises(BadRequest, match=reason) as caught:
        byte_fallback().render_chat(messages)
    assert caught.value.field == "messages"


def test_chat_without_a_template_is_a_bad_request():
    with pytest.raises(BadRequest, match="no chat template"):
        byte_level().render_chat(CHAT)


def test_half_a_surrogate_pair_in_a_message_is_refused_by_name():
    with pytest.raises(BadRequest, match="messages must be valid Unicode"):
        byte_fallback().encode_chat([{"role": "user", "content": "\ud83d"}])


@both
def test_saved_tokenizer_loads_and_reads_the_same(text, tmp_path):
    text.tokenizer.save_pretrained(tmp_path)
    loaded = Text.load(tmp_path)
    assert loaded.encode(CORPUS[2]) == text.encode(CORPUS[2])
    assert loaded.decode(loaded.encode(CORPUS[2])).strip() == CORPUS[2]


@pytest.mark.parametrize("content", [None, "not json", "{}"])
def test_missing_or_broken_tokenizer_stops_the_start_with_a_sentence(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(StartupError, match=r"tokenizer in .* cannot be read: ") as caught:
        Text.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_code_that_lies_beside_a_tokenizer_never_runs(tmp_path):
    (tmp_path / "code.py").write_text("raise SystemExit('ran')\nclass T: ...\n")
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": [null, "code.T"]}}')
    with pytest.raises(StartupError):
        Text.load(tmp_path)
