"""Text streams: the same text in pieces as at once, whole characters, stop strings cut out."""

import pytest

from pilotfish.decode.detokenize import TextStream
from tests.chat_tokenizers import hh_tokenizer, word_tokenizer


@pytest.mark.parametrize("text", ["Naïve café, 12 eggs!", "  two  spaces\n\nHuman: 🍲 soup"])
def test_pieces_join_to_the_decoded_text(text: str) -> None:
    tokenizer = hh_tokenizer()
    stream = TextStream(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = [stream.push(token_id) for token_id in ids]
    pieces.append(stream.flush())
    assert "".join(pieces) == stream.text == tokenizer.decode(ids) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_fork_goes_on_by_itself_from_where_it_was_taken() -> None:
    tokenizer = hh_tokenizer()
    ids = tokenizer.encode("put 🍲 in. Then wait. Then eat", add_special_tokens=False)
    for cut in range(len(ids)):  # also inside a character, and inside a stop string
        stream, whole = TextStream(tokenizer, ("wait",)), TextStream(tokenizer, ("wait",))
        for token_id in ids[:cut]:
            stream.push(token_id)
        other = stream.fork()
        for token_id in tokenizer.encode(" soup", add_special_tokens=False):
            stream.push(token_id)
        for token_id in ids[cut:]:
            other.push(token_id)
        for token_id in ids:
            whole.push(token_id)
        assert other.text == whole.text
        assert other.stopped


def test_special_tokens_give_no_text() -> None:
    tokenizer = word_tokenizer()
    stream = TextStream(tokenizer)
    for token_id in tokenizer.encode("boil it <eos>"):
        stream.push(token_id)
    assert stream.text == "boil it"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("put it in. Then wait", (". Then",), "put it in"),
        ("aab aaab", ("aab",), ""),
        ("xaaab", ("aab",), "xa"),
        ("one two three", ("three", "two"), "one "),
        ("never here", ("stop",), "never here"),
        ("ends like sto", ("stop",), "ends like sto"),
    ],
)
def test_text_ends_where_the_first_stop_string_begins(
    text: str, stop: tuple[str, ...], expected: str
) -> None:
    tokenizer = hh_tokenizer()
    stream = TextStream(tokenizer, stop)
    released = ""
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        released += stream.push(token_id)
        assert expected.startswith(released)
        if stream.stopped:
            break
    released += stream.flush()
    assert released == expected
    assert stream.stopped is (expected != text)


@pytest.mark.parametrize(
    ("min_tokens", "expected"),
    [
        (0, ""),
        (1, ""),
        (2, "abac"),
        (6, "abacab"),
        (9, "abacabab"),
        (10, "abacabababcac"),  # what ended too early is held, since "abc!" begins like it
    ],
)
def test_stop_strings_of_the_first_tokens_are_plain_text(min_tokens: int, expected: str) -> None:
    tokenizer = hh_tokenizer()
    ids = [tokenizer.encode(one, add_special_tokens=False) for one in "abacabababcac"]
    assert all(len(one) == 1 for one in ids)
    stream = TextStream(tokenizer, ("ab", "abc!"), min_tokens=min_tokens)
    for [token_id] in ids:
        stream.push(token_id)
    stream.flush()
    assert stream.text == expected


def test_the_stop_string_that_ends_a_text_can_stay_in_it() -> None:
    tokenizer = hh_tokenizer()
    stream = TextStream(tokenizer, ("wait", "wait."), keep_stop=True)
    ids = tokenizer.encode("put it in. Then wait. Then eat", add_special_tokens=False)
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join([*pieces, stream.flush()]) == stream.text == "put it in. Then wait"
