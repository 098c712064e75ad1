from __future__ import annotations

import json
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apt_core.data.sources import text_default
from apt_core.data.tokenizers.bpe import BPETokenizer
from apt_core.data.tokenizers.byte import ByteTokenizer
from apt_core.data.tokenizers.char import CharTokenizer
from apt_core.data.tokenizers.chat import CHAT_TEMPLATE, ChatTemplate
from apt_core.data.tokenizers.hf import HFTokenizer
from apt_core.data.tokenizers.words import pieces_of
from apt_core.errors import ConfigError
from apt_core.providers import Document
from apt_core.providers.dataset import DataSection
from apt_core.providers.tokenizer import SPECIAL_NAMES

CORPUS = [
    "def area(width, height):\n    return width * height  # it's 42 or 1234\n",
    "The quick brown fox jumps over the lazy dog, THE DOG'S bed and they'll sleep.\r\n\r\n",
    "Größe, naïve façade: 中文字符 と 日本語 한국어 \U0001f600\n\tindented\n",
]
SIZE = 340

ODD = [
    *map(chr, range(128)), *"\x85\xa0\u017f\u2028\u3000\u0301\u0663\u2460\U0001f600\U00010400é中文",
    "'s", "'LL", "\r\n", "  ", " \n\n ", "\nab", *SPECIAL_NAMES,
]  # fmt: skip
TEXT = st.one_of(st.text(), st.lists(st.sampled_from(ODD), max_size=60).map("".join))

TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "é <|end|><|user|> hi"},
    {"role": "assistant", "content": " yes 中"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "no"},
]
CHAT = Document.of({"messages": TURNS})
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer of Hugging Face, with all that its files may ask for."""
    from tokenizers import Tokenizer

    path = tmp_path_factory.mktemp("hf")
    tokenizer = trained(BPETokenizer({"vocab_size": SIZE}))
    tokenizer.save(path)
    backend = Tokenizer.from_file(str(path / "tokenizer.json"))
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<s>"])
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": {"content": "<|pad|>", "__type": "AddedToken"},
        "unk_token": "[UNKNOWN]",
        "chat_template": [{"name": "default", "template": CHATML}],
        "added_tokens_decoder": {
            "400": {"content": "<x>", "special": False, "lstrip": True, "normalized": False}
        },
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def tokenizers(folder):
    return {
        "byte": ByteTokenizer(),
        "char": trained(CharTokenizer()),
        "bpe": trained(BPETokenizer({"vocab_size": SIZE})),
        "hf": HFTokenizer({"path": str(folder)}),
    }


def trained(tokenizer):
    tokenizer.train(CORPUS * 3)
    return tokenizer


def backend_of(bpe: BPETokenizer, folder):
    from tokenizers import Tokenizer

    bpe.save(folder)
    path = folder / "tokenizer.json"
    kept = json.loads(path.read_text())
    kept["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(kept))


@settings(max_examples=150)
@given(text=TEXT)
def test_any_text_round_trips_and_never_becomes_a_special_token(tokenizers, text):
    for name, tokenizer in tokenizers.items():
        ids = tokenizer.encode(text)
        assert all(type(each) is int and 0 <= each < tokenizer.vocab_size for each in ids)
        assert tokenizer.encode_array(text).tolist() == ids
        if name == "hf":
            continue
        assert tokenizer.decode(ids) == text, name
        assert not set(ids) & set(tokenizer.special.names), name
        special = list(tokenizer.special.names)
        assert tokenizer.decode([*special, *ids, *special]) == text, name


def test_bpe_splits_words_as_tokenizers_does(tokenizers, tmp_path):
    bpe = tokenizers["bpe"]
    backend, draw = backend_of(bpe, tmp_path), random.Random(0)
    others = [*range(0x80, 0xD800), *range(0xE000, 0x10000)]
    for _ in range(1500):
        parts = [
            draw.choice(ODD) if draw.random() < 0.8 else chr(draw.choice(others))
            for _ in range(draw.randrange(60))
        ]
        text = "".join(parts)
        ids = backend.encode(text).ids
        assert bpe.encode(text) == ids, repr(text)
        pieces = list(pieces_of(text, 5))
        assert "".join(pieces) == text
        assert [each for piece in pieces for each in bpe.encode(piece)] == ids, repr(text)
    every = "".join(map(chr, others))
    assert bpe.encode(every) == backend.encode(every).ids
    assert bpe.encode("1234") == [bpe.encode(digit)[0] for digit in "1234"]


def test_vocabularies_hold_what_was_asked_for(tokenizers):
    sizes = {name: tokenizer.vocab_size for name, tokenizer in tokenizers.items()}
    characters = {char for text in CORPUS for char in text if char > "\x7f"}
    assert sizes["byte"] == 256 and sizes["bpe"] == SIZE
    assert sizes["char"] == 256 + len(characters) + 7
    few = CharTokenizer({"vocab_size": 265})
    few.train(["ééé中中文"])
    assert (few.vocab_size, few.characters) == (265, "é中") and few.decode(few.encode("文")) == "文"
    short = BPETokenizer({"vocab_size": 5000})
    short.train(["abcabc"])
    assert 263 < short.vocab_size < 300
    for tokenizer in (CharTokenizer(), BPETokenizer()):
        assert tokenizer.vocab_size == 263 and tokenizer.decode(tokenizer.encode("é1")) == "é1"
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.vocab_size: is not given"):
        BPETokenizer().train(CORPUS)
    for tokenizer in tokenizers.values():
        with pytest.raises(ValueError):
            tokenizer.encode("a\ud800b")


def test_what_is_saved_or_pickled_makes_the_same_ids(tokenizers, tmp_path):
    text = "".join(CORPUS)
    for name, tokenizer in tokenizers.items():
        place = tmp_path / name
        place.mkdir()
        tokenizer.encode(text)  # what it has made for itself is no part of it
        tokenizer.save(place)
        loaded = type(tokenizer)()
        loaded.load(place)
        for other in (loaded, pickle.loads(pickle.dumps(tokenizer))):
            assert other.fingerprint() == tokenizer.fingerprint() is not None
            assert other.encode(text) == tokenizer.encode(text)
            assert (other.vocab_size, other.special) == (tokenizer.vocab_size, tokenizer.special)
            assert other.chat_template == tokenizer.chat_template
            assert other.encode_document(CHAT).ids.tolist() == (
                tokenizer.encode_document(CHAT).ids.tolist()
            )
    assert len({tokenizer.fingerprint() for tokenizer in tokenizers.values()}) == 4


def test_a_kept_tokenizer_does_not_need_the_file_of_its_template(tokenizers, folder, tmp_path):
    path = tmp_path / "own.jinja"
    for name, tokenizer in tokenizers.items():
        path.write_text("{% for m in messages %}!{{ m.content }}{% endfor %}")
        given = {"path": str(folder), "vocab_size": SIZE, "chat_template": str(path)}
        made = type(tokenizer)(given)
        if made.trainable:
            made.train(CORPUS * 3)
        place = tmp_path / name
        place.mkdir()
        made.save(place)
        ids, template = made.encode_document(CHAT).ids.tolist(), made.chat_template
        assert template == path.read_text() != tokenizer.chat_template
        for gone in (False, True):
            path.unlink() if gone else path.write_text("changed")
            loaded = type(tokenizer)(given)
            loaded.load(place)
            assert loaded.chat_template == template
            assert loaded.encode_document(CHAT).ids.tolist() == ids
            assert loaded.fingerprint() == made.fingerprint()


SPLITS = {
    # As GPT-2, Llama 3 and BERT split words.
    "gpt2": r"'s|'t|'re| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": r"'s|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "bert": r"\s+",
}


def test_pieces_of_a_text_have_the_ids_of_the_whole(tokenizers, tmp_path, monkeypatch):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    prose = "".join(f"Line {n} ends, of “prose”.\n\n  - it's {n * 77}  \n" for n in range(90))
    code = "".join(f"    if x[{n}]:\r\n\treturn {n} +  y{n}\r\n\r\n" for n in range(90))
    kanji = "".join(f"第{n}行、中文。\n" for n in range(90))
    others = {}
    for name, pattern in SPLITS.items():
        made = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(pattern), "removed" if name == "bert" else "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([split, level])
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet,
                                      special_tokens=["<s>"], show_progress=False)  # fmt: skip
        made.train_from_iterator([prose, code, kanji], trainer)
        place = tmp_path / name
        place.mkdir()
        made.save(str(place / "tokenizer.json"))
        config = {"bos_token": "<s>", "add_bos_token": True, "eos_token": "<s>"}
        (place / "tokenizer_config.json").write_text(json.dumps(config))
        others[name] = HFTokenizer({"path": str(place)})

    monkeypatch.setattr(text_default, "MAX_CHARS", 100)
    for text in (prose, code, kanji):
        path = tmp_path / "text.txt"
        path.write_bytes(text.encode())
        source = text_default.TextDataset(DataSection(train_path=str(path)))
        documents = list(source.documents())
        assert len(documents) > 5
        for name, tokenizer in {**tokenizers, **others}.items():
            pieces = [each.ids for each in tokenizer.encode_documents(documents)]
            whole = tokenizer.encode_document(Document(text=text)).ids
            assert np.concatenate(pieces).tolist() == whole.tolist(), name
            each = [tokenizer.encode_document(document).ids for document in documents]
            assert np.concatenate(each).tolist() == whole.tolist(), name


def test_a_fingerprint_is_of_all_that_decides_the_ids(tokenizers, folder, tmp_path):
    (tmp_path / "other.jinja").write_text("{{ messages }}")
    template = {"chat_template": str(tmp_path / "other.jinja")}
    seen = {ByteTokenizer().fingerprint(), ByteTokenizer(template).fingerprint()}
    for made in (CharTokenizer(template), BPETokenizer({"vocab_size": SIZE, **template})):
        seen |= {made.fingerprint(), trained(made).fingerprint()}
    seen |= {tokenizers["bpe"].fingerprint(), tokenizers["hf"].fingerprint()}
    seen.add(HFTokenizer({"path": str(folder), **template}).fingerprint())
    assert len(seen) == 9

    for kind in (ByteTokenizer, CharTokenizer, BPETokenizer, HFTokenizer):
        other = type("Other", (kind,), {"encode": lambda self, text: []})
        assert other({"path": str(folder)}).fingerprint() is None


@pytest.mark.parametrize("name", ["byte", "char", "bpe"])
def test_conversations_are_turns_of_which_the_assistants_are_learned(tokenizers, name, tmp_path):
    tokenizer = tokenizers[name]
    named = {token: text for token, text in tokenizer.special.names.items()}

    def shown(ids):
        return "".join(named.get(each, "") or tokenizer.decode([each]) for each in ids)

    def parts(tokenizer, document):
        encoded = tokenizer.encode_document(document)
        kept = encoded.ids[encoded.learned]
        return encoded.ids.tolist(), [int(each) for each in kept]

    ids, learned = parts(tokenizer, CHAT)
    yes, no = tokenizer.encode(" yes 中"), tokenizer.encode("no")
    end, eos = tokenizer.special.end, tokenizer.special.eos
    assert learned == [*yes, end, *no, end, eos]
    assert ids[0] == tokenizer.special.roles["system"] and ids.count(tokenizer.special.end) == 5
    asked = Document.of({"messages": TURNS[:4]})
    assert tokenizer.encode_prompt(asked) == ids[: -len(no) - 2]
    # The template that goes with the tokenizer says the same, and so does one like it.
    template = ChatTemplate(tokenizer.chat_template)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert [text for text, learns in template.pieces(CHAT.messages) if learns] == [
        " yes 中<|end|>",
        "no<|end|>",
    ]
    (tmp_path / "same.jinja").write_text(CHAT_TEMPLATE)
    (tmp_path / "plain.jinja").write_text(
        CHATML.replace("<|im_", "<|").replace("<|start", "<|user")
    )
    same = pickle.loads(pickle.dumps(tokenizer))
    same.settings = same.settings.model_copy(update={"chat_template": str(tmp_path / "same.jinja")})
    assert parts(same, CHAT) == (ids, learned)
    assert same.encode_prompt(asked) == tokenizer.encode_prompt(asked)
    plain = pickle.loads(pickle.dumps(tokenizer))
    plain.settings = same.settings.model_copy(
        update={"chat_template": str(tmp_path / "plain.jinja")}
    )
    ids, learned = parts(plain, CHAT)
    assert ids.count(tokenizer.special.roles["user"]) == 5
    newline = tokenizer.encode("\n")
    assert learned == [*yes, end, *newline, *no, end, *newline, eos]
    assert tokenizer.decode(ids).count("<|end|><|user|>") == 1


def test_hf_gives_the_ids_of_transformers(tokenizers, folder):
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(str(folder)), tokenizers["hf"]
    draw = random.Random(0)
    parts = [*ODD, "<|im_end|>", " <x> ", "[UNKNOWN]", "<s>"]
    texts = ["".join(draw.choices(parts, k=draw.randrange(30))) for _ in range(400)]
    batch = ours.encode_documents([Document.of(text or "a") for text in texts])
    for text, encoded in zip(texts, batch, strict=True):
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids, repr(text)
        if text:
            assert encoded.ids.tolist() == [*ids, theirs.eos_token_id]
            assert ours.encode_document(Document.of(text)).ids.tolist() == encoded.ids.tolist()
    assert len(theirs) == ours.vocab_size
    assert ours.special.pad == theirs.pad_token_id and ours.special.bos is None

    encoded = ours.encode_document(CHAT)
    assert encoded.ids.tolist() == theirs.apply_chat_template(TURNS, return_dict=False)
    learned = [int(each) for each in encoded.ids[encoded.learned]]
    assert theirs.decode(learned) == " yes 中<|im_end|>\nno<|im_end|>\n"
    prompt = theirs.apply_chat_template(TURNS[:4], add_generation_prompt=True, return_dict=False)
    assert ours.encode_prompt(Document.of({"messages": TURNS[:4]})) == prompt
    pair = ours.encode_document(Document.of({"prompt": "2+2", "response": "4"}))
    assert pair.ids[pair.learned].tolist() == [*ours.encode("4"), theirs.eos_token_id]


def test_hf_begins_with_bos_where_the_tokenizer_puts_it(folder, tmp_path):
    from tokenizers import Tokenizer, processors

    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    hf = HFTokenizer({"path": str(tmp_path)})
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    assert hf.encode_document(Document.of("ab")).ids.tolist() == theirs("ab")["input_ids"]
    assert hf.encode("ab") == hf.encode_document(Document.of("ab")).ids.tolist()[1:]
    chat = Document.of({"messages": TURNS[:1]})
    assert hf.encode_document(chat).ids.tolist() == [bos, *hf.encode("be brief")]


def test_hf_ends_texts_where_the_generation_config_beside_it_says_so(folder, tmp_path):
    place = Path(shutil.copytree(folder, tmp_path / "hf"))
    said = place / "generation_config.json"
    plain = HFTokenizer({"path": str(folder)})
    assert plain.special.ends == ()
    for eos, ends in (([5, 3, 5, 10**6], (3, 5)), (7, (7,)), (None, ())):
        said.write_text(json.dumps({"eos_token_id": eos}))
        hf = HFTokenizer({"path": str(place)})
        assert hf.special.ends == ends and hf.fingerprint() == plain.fingerprint()
        kept = tmp_path / f"kept {eos}"
        kept.mkdir()
        hf.save(kept)
        assert HFTokenizer({"path": str(kept)}).special == hf.special
    for nonsense in ("5", [True], -1, [1.5]):
        said.write_text(json.dumps({"eos_token_id": nonsense}))
        with pytest.raises(ConfigError, match=r"eos_token_id of its .* is no id"):
            _ = HFTokenizer({"path": str(place)}).special


def test_templates_that_cannot_serve_say_why(tokenizers, folder, tmp_path):
    hf = tokenizers["hf"]
    cases = {
        "{% for m in messages %}{{ m.content }}{% if loop.last %}!{% endif %}{% endfor %}": (
            "renders a turn in another way once others follow"
        ),
        "{{ raise_exception('roles must alternate') }}": "roles must alternate",
        "{{ ''.__class__.__mro__ }}": "refuses it",
    }
    for source, message in cases.items():
        with pytest.raises(ValueError, match=message):
            ChatTemplate(source).pieces(CHAT.messages)
    with pytest.raises(ValueError, match="U\\+FDD0"):
        ChatTemplate(CHATML).pieces(
            Document.of({"messages": [{"role": "user", "content": "\ufdd0"}]}).messages
        )
    with pytest.raises(ConfigError, match="the chat template cannot be read"):
        ChatTemplate("{% for %}")
    with pytest.raises(ConfigError, match=r"none: data\.tokenizer\.chat_template: cannot be read"):
        ByteTokenizer({"chat_template": str(tmp_path / "none")}).encode_document(CHAT)
    alone = HFTokenizer({"path": str(folder / "tokenizer.json")})
    assert alone.encode("ab") == hf.encode("ab")
    with pytest.raises(ValueError, match="has no chat template"):
        alone.encode_document(CHAT)
    blocks = CHATML.replace("{{ '<|im_start|>' + m.role", "{% generation %}{{ m.role").replace(
        "<|im_end|>\\n' }}", "' }}{% endgeneration %}|"
    )
    assert [text for text, learns in ChatTemplate(blocks).pieces(CHAT.messages) if not learns] == (
        ["|"] * 5
    )


def model(folder, vocabulary, config=None, unknown="a"):
    """A folder of Hugging Face with a tokenizer of whole words."""
    folder.mkdir()
    words = {"type": "WordLevel", "vocab": vocabulary, "unk_token": unknown}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": words}))
    text = config if isinstance(config, str) else json.dumps(config or {})
    (folder / "tokenizer_config.json").write_text(text)
    return folder


DOUBLED = "{% set n = namespace(x=START) %}{% for i in range(60) %}{% set n.x = STEP %}{% endfor %}"

HOSTILE = {
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}": "turns",
    "{% macro f(n) %}{% if n %}{{ f(n-1) ~ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}": "turns",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{% for i in range(99999) %}" + "static " * 1000 + "{% endfor %}": "characters",
    DOUBLED.replace("START", "'a'").replace("STEP", "n.x + n.x"): "characters",
    DOUBLED.replace("START", "'a'").replace("STEP", "n.x ~ n.x"): "characters",
    DOUBLED.replace("START", "['a']").replace("STEP", "n.x + n.x"): "items",
    DOUBLED.replace("START", "['a']").replace("STEP", "[n.x, n.x]") + "{{ n.x }}": "characters",
    DOUBLED.replace("START", "['a']").replace("STEP", "[n.x, n.x]")
    + "{{ '' ~ n.x }}": "characters",
    DOUBLED.replace("START", "['a']").replace("STEP", "[n.x, n.x]") + "{{ '%s' % n.x }}": (
        "characters"
    ),
    DOUBLED.replace("START", "7").replace("STEP", "n.x * n.x"): "bits",
    "{{ 'x' * 10000000000 }}": "characters",
    "{{ messages * 10000000000 }}": "items",
    "{{ 9**99999 }}": "power",
    "{{ 'a'.ljust(9999999999) }}": "characters",
    "{{ 'a'|indent(9999999999, true) }}": "characters",
    "{{ 'a'|center(9999999999) }}": "uses center",
    "{{ [1]|batch(9999999999, 'x')|list }}": "uses batch",
    "{{ [1]|slice(9999999999)|list }}": "uses slice",
    "{{ 1.5|round(9999999999, 'floor') }}": "uses round",
    "{{ ([[1] * 99999] * 99999)|sum(start=[]) }}": "uses sum",
    "{{ [1, 2]|tojson(indent=9999999999) }}": "characters",
    "{{ 'a'.encode() * 9999999999 }}": "encode",
    "{{ (1).to_bytes(9999999999, 'big') }}": "to_bytes",
    "{{ ('a' * 100000)|replace('a', 'a' * 100000) }}": "characters",
    "{{ (['a' * 100000] * 100000)|join }}": "characters",
    "{{ 'a'.join(['a' * 100000] * 100000) }}": "characters",
    "{{ '{:9999999999}'.format('a') }}": "fills a text",
    "{{ '{:{}}'.format('a', 9999999999) }}": "width that it computes",
    "{{ '%9999999999s' % 'a' }}": "fills a text",
    "{{ 'a'.translate({97: 'b' * 1000}) }}": "translate",
    "{{ lipsum(n=100000) }}": "lipsum",
}


def test_chat_templates_have_no_reach_and_bounded_work():
    for source, message in HOSTILE.items():
        with pytest.raises(ValueError, match=f"the chat template refuses it: .*{message}"):
            ChatTemplate(source).prompt(CHAT.messages)
    escapes = ("messages.__class__", "''.format.__globals__", "'{0.__class__}'.format(messages)")
    for escape in escapes:  # is nothing to a template, or refused
        try:
            assert ChatTemplate(f"{{{{ {escape} }}}}").prompt(CHAT.messages) == ""
        except ValueError as error:
            assert "unsafe" in str(error)
    for source in ("{{ " + "(" * 500 + "1" + ")" * 500 + " }}", "{% for i in x %}" * 30):
        with pytest.raises(ConfigError, match=r"nested too deep|cannot be read"):
            ChatTemplate(source)


def test_chat_templates_may_do_what_templates_do():
    used = (
        "{%- set ns = namespace(n=0) -%}{%- for m in messages -%}{%- set ns.n = ns.n + 1 -%}"
        "{{ loop.index }}{{ m['role'] | upper }}:{{ m.content.strip().replace('a', 'b') + '.' }}"
        "{%- if loop.index > 90 %}{% break %}{% endif -%}{%- endfor -%}"
        "{{ ns.n }} {{ messages | map(attribute='role') | unique | join(',') }} "
        "{{ messages[0] | tojson }} {{ 'a%sb' | format(3) }} {{ '{:>3}'.format(7) }} {{ '%d' % 5 }}"
    )
    messages = Document.of({"messages": [{"role": "user", "content": " a é "}]}).messages
    expected = '1USER:b é.1 user {"role": "user", "content": " a é "} a3b   7 5'
    assert ChatTemplate(used).prompt(messages) == expected


def test_tokenizers_that_cannot_be_read_say_why(tmp_path):
    (tmp_path / "text.json").write_text("no JSON")
    (tmp_path / "bytes.json").write_bytes(b"\xff")
    for given_path, message in [
        (None, "names no tokenizer"),
        (tmp_path / "missing", "does not exist .*save_pretrained"),
        (tmp_path, "does not exist"),
        (tmp_path / "text.json", "is no tokenizer.json"),
        (tmp_path / "bytes.json", "cannot read"),
        (model(tmp_path / "empty", {}), "vocabulary of its tokenizer.json is empty"),
        (model(tmp_path / "deep", {"a": 0}, "[" * 9999), "nested too deep"),
        (model(tmp_path / "list", {"a": 0}, {"added_tokens_decoder": [1]}), "no mapping of ids"),
        (model(tmp_path / "no", {"a": 0}, {"added_tokens_decoder": {"x": 1}}), "no mapping of ids"),
        (model(tmp_path / "x", {"a": 0}, {"added_tokens_decoder": {"x": {"content": "b"}}}), "'x'"),
        (model(tmp_path / "odd", {"a": 0}, {"chat_template": 3}), "chat_template is no text"),
        (model(tmp_path / "map", {"a": 0}, [1]), "is no JSON object"),
    ]:
        setting = {} if given_path is None else {"path": str(given_path)}
        with pytest.raises(ConfigError, match=f"data.tokenizer.path: .*{message}") as raised:
            HFTokenizer(setting).vocab_size  # noqa: B018
        assert len(raised.value.problems) == 1
    refuses = HFTokenizer({"path": str(model(tmp_path / "unk", {"a": 0}, unknown="b"))})
    for encode in (refuses.encode_document, lambda document: refuses.encode_documents([document])):
        with pytest.raises(ValueError, match=r"tokenizer.json \(WordLevel\) refuses a text: .*UNK"):
            encode(Document(text="c"))
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(3 << 30)
    with pytest.raises(ConfigError, match="larger than"):
        HFTokenizer({"path": str(tmp_path / "huge.json")}).vocab_size  # noqa: B018
    for made, name in ((CharTokenizer(), "characters.json"), (BPETokenizer(), "tokenizer.json")):
        with pytest.raises(OSError):
            made.load(tmp_path)
        for text in ("no JSON", "{}", "[1]", '{"characters": "éé", "model": {"vocab": {"a": 3}}}'):
            (tmp_path / name).write_text(text)
            with pytest.raises(ValueError):
                made.load(tmp_path)


def test_ids_are_of_the_smallest_type(tokenizers):
    types = {name: each.encode_array("ab").dtype for name, each in tokenizers.items()}
    assert types == {
        "byte": np.uint8,
        "char": np.uint16,
        "bpe": np.uint16,
        "hf": np.uint16,
    }
