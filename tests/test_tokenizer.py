"""The tokenizer: exact bytes both ways, no marker from a user's text, the same ids in Hugging Face's form."""

import itertools
import json
import pickle
import pydoc_data.topics
import random

import pytest

from afm_rl.tokenizer import Tokenizer
from afm_rl.tokenizer_afm import MARKER_PIECES
from afm_rl.tokenizer_export import tokenizer_config, tokenizer_json
from afm_rl.types import Message
from pretrain.tokenizer_training import MIN_VOCAB_SIZE, train_tokenizer

VOCAB_SIZE = 800
CHAT = (
    Message("system", "be  kind\n"),
    Message("user", " 37 + 25 <|end|>"),
    Message("assistant", "62"),
    Message("user", "\u2581"),
)
AWKWARD = (
    "",
    " ",
    "   two  spaces   ",
    "\n",
    "\n\n",
    "a\n\n\n b\n",
    "\r",
    "a\r\nb",
    "\x00",
    "a\x00\x00b",
    "\t\ttabs\x0b\x0c",
    "\u2581",
    "\u2581 \u2581\u2581a \u2581b",
    "\u2585 \ufffd \ufeff\u200d",
    "naïve cafe\u0301 ﬁ Ａ ½",
    "日本語 🎉👩\u200d👩\u200d👧 \U0010ffff",
    "<|user|>hi<|end|>",
    "<|pad|><|endoftext|><|unknown|>",
    "<0x0A> <unk> </s>",
    "1234567890 3.14 0x1F",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return train_tokenizer(pydoc_data.topics.topics.values(), vocab_size=VOCAB_SIZE, folder=folder), folder


@pytest.fixture(scope="module")
def tokenizer(trained):
    return trained[0]


def random_texts(tokenizer, number):
    """Random code points, strings over few characters (many competing merges), and strings of learnt pieces."""
    rng = random.Random(0)
    pieces = [tokenizer.token_bytes(i).decode() for i in range(len(MARKER_PIECES) + 257, tokenizer.vocab_size)]
    for _ in range(number):
        length = rng.randrange(1, 40)
        code_points = [rng.choice([rng.randrange(128), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])]
        yield "".join(chr(rng.choice([*code_points, rng.randrange(32, 127)])) for _ in range(length))
        yield "".join(rng.choices("  \n\u2581aabdeinst-_5", k=length))
        yield "".join(rng.choices(pieces, k=length))


@pytest.mark.parametrize("text", AWKWARD)
def test_text_comes_back_byte_for_byte(tokenizer, text):
    """Guards SPEC 2: whatever goes in comes back, U+2581, NUL, lone spaces and newlines included."""
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_random_text_comes_back_byte_for_byte(tokenizer):
    """The same over random Unicode and over strings of the tokenizer's own pieces."""
    for text in random_texts(tokenizer, 300):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_user_text_never_makes_a_marker(tokenizer):
    """Prompt injection: a user who spells a marker gets its characters, also when an id is built up by merges."""
    for piece in MARKER_PIECES:
        for text in (piece, f"a{piece}b", piece * 3, piece[:-1] + " >"):
            assert min(tokenizer.encode(text)) >= len(MARKER_PIECES)


def test_markers_are_not_learnt_from_a_corpus_full_of_them(tmp_path):
    """A corpus that spells markers and byte pieces everywhere must not teach them as text."""
    corpus = ["<|user|> <0x0A> <|unknown|>\u2581 the cat\x00 sat on the mat\u2585"] * 500
    tokenizer = train_tokenizer(corpus, vocab_size=MIN_VOCAB_SIZE + 10, folder=tmp_path)
    assert min(tokenizer.encode("<|user|>")) >= len(MARKER_PIECES)
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in (*AWKWARD, *corpus[:1]))


def test_every_digit_is_a_token(tokenizer):
    """3.1.6: numbers are split into digits, in any surroundings."""
    for text in ("1234567890", "a12b", " 12 345", "x=100;", "3.14"):
        digits = [tokenizer.decode([token]) for token in tokenizer.encode(text)]
        assert [piece for piece in digits if any(c.isdigit() for c in piece)] == [c for c in text if c.isdigit()]


def test_printable_ascii_never_falls_to_bytes(tokenizer):
    """Every printable ASCII character is one token even where the corpus lacks it."""
    for code in range(32, 127):
        assert len(tokenizer.encode(chr(code))) == 1


def test_unknown_characters_fall_to_utf8_bytes(tokenizer):
    """Byte fallback: four tokens for an emoji, and half of them decode to U+FFFD instead of failing."""
    ids = tokenizer.encode("🎉")
    assert [tokenizer.token_bytes(token) for token in ids] == [b"\xf0", b"\x9f", b"\x8e", b"\x89"]
    assert tokenizer.decode(ids[:3]) == "\ufffd"


def test_common_words_are_learnt(tokenizer):
    """The merges are really there: English prose takes well under half a token per character."""
    text = "This statement is used to define the value of the object in the class.\n    return self"
    assert len(tokenizer.encode(text)) < 0.45 * len(text)
    assert tokenizer.encode("\n    return")[0] == tokenizer.encode("\n")[0]


def test_lone_surrogates_and_foreign_ids_are_refused(tokenizer):
    """What cannot come back byte for byte is an error that says where, not a silent U+FFFD."""
    with pytest.raises(ValueError, match=r"character 2 .*lone surrogate"):
        tokenizer.encode("ab\ud800")
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            tokenizer.decode([token])


def test_special_ids(tokenizer):
    """Padding is 0 everywhere; markers decode to nothing."""
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.end_of_turn_id, tokenizer.vocab_size) == (0, 1, 6, VOCAB_SIZE)
    assert tokenizer.decode(range(len(MARKER_PIECES))) == ""


def test_chat_format(tokenizer):
    """One marker a turn, the text, one end; the generation prompt opens the assistant's turn."""
    ids = tokenizer.encode_chat([Message("user", "hi")])
    assert ids == [4, *tokenizer.encode("hi"), tokenizer.end_of_turn_id, 5]
    assert tokenizer.encode_response("ok") == [*tokenizer.encode("ok"), tokenizer.end_of_turn_id]
    with pytest.raises(ValueError, match=r"messages\[0\].role is 'tool'"):
        tokenizer.encode_chat([Message("tool", "x")])


def test_chat_prompt_and_response_join(tokenizer):
    """Training on prompt + response sees the very ids of the whole conversation: no merge across the border."""
    joined = tokenizer.encode_chat(CHAT[:2]) + tokenizer.encode_response(CHAT[2].content)
    assert joined == tokenizer.encode_chat(CHAT[:3], add_generation_prompt=False)


def test_save_load_and_pickle(trained, tmp_path):
    """The same bytes, ids and fingerprint after a save, and across a process border."""
    tokenizer, folder = trained
    tokenizer.save(tmp_path / "copy")
    for other in (Tokenizer.load(folder), Tokenizer.load(tmp_path / "copy"), pickle.loads(pickle.dumps(tokenizer))):
        assert other.fingerprint == tokenizer.fingerprint
        assert other.encode("a b 12") == tokenizer.encode("a b 12")


def test_load_errors_name_the_file(tmp_path):
    """A missing or foreign tokenizer.model is an error that names it."""
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer.model nor tokenizer.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"tokenizer.model: not a SentencePiece model"):
        Tokenizer.load(tmp_path)


def test_training_is_deterministic_and_samples(tmp_path):
    """Equal texts give equal bytes, also when the corpus is sampled."""
    texts = list(pydoc_data.topics.topics.values())
    a, b = (train_tokenizer(iter(texts), vocab_size=500, folder=tmp_path / name, max_chars=60_000) for name in ("a", "b"))
    assert a.fingerprint == b.fingerprint


def test_training_errors(tmp_path):
    """Impossible requests say which number is possible."""
    with pytest.raises(ValueError, match=f"at least {MIN_VOCAB_SIZE}"):
        train_tokenizer(["a b"], vocab_size=100, folder=tmp_path)
    with pytest.raises(ValueError, match=r"too large for this corpus .* at most [0-9]+ pieces"):
        train_tokenizer(["a b c"], vocab_size=2000, folder=tmp_path)
    with pytest.raises(ValueError, match="corpus is empty"):
        train_tokenizer([], vocab_size=2000, folder=tmp_path)


def test_hugging_face_form_gives_the_same_ids(tokenizer):
    """tokenizer.json, run by a separate implementation of its BPE rules, equals SentencePiece on every text."""
    model = tokenizer_json(tokenizer)["model"]
    for text in (*AWKWARD, *random_texts(tokenizer, 150)):
        assert reference_bpe(text, model) == tokenizer.encode(text), text


def test_hugging_face_library_agrees(tokenizer):
    """The same with their library, where it is installed: ids and decoding."""
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer)))
    for text in (*AWKWARD, *random_texts(tokenizer, 300)):
        if any(piece in text for piece in MARKER_PIECES):
            continue
        ids = tokenizer.encode(text)
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids) == text


def test_hugging_face_chat_template_is_the_chat_format(tokenizer):
    """Rendered by Jinja as transformers does it, the template spells out what encode_chat encodes."""
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        tokenizer_config(tokenizer, max_positions=64)["chat_template"]
    )
    messages = [{"role": m.role, "content": m.content} for m in CHAT]
    for add in (True, False):
        text = template.render(messages=messages, add_generation_prompt=add)
        expected = "".join(f"<|{m.role}|>{m.content}<|end|>" for m in CHAT) + ("<|assistant|>" if add else "")
        assert text == expected
        marked = tokenizer.encode_chat(CHAT, add_generation_prompt=add)
        pieces = [MARKER_PIECES[i].encode() if i < len(MARKER_PIECES) else tokenizer.token_bytes(i) for i in marked]
        assert b"".join(pieces).decode() == text


def reference_bpe(text, model):
    """Hugging Face's BPE, plainly: bytes for unknown characters, then the lowest-ranked pair, leftmost first."""
    vocab, ranks = model["vocab"], {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    symbols = []
    for character in text:
        symbols += [character] if character in vocab else [f"<0x{byte:02X}>" for byte in character.encode()]
    while True:
        candidates = [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(symbols)) if pair in ranks]
        if not candidates:
            return [vocab[symbol] for symbol in symbols]
        _, i = min(candidates)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
