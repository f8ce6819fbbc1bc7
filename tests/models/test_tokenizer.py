"""Tokens, bytes and chat templates, against transformers' own tokeniser class."""

import json

import pytest
import tokenizers
import transformers
from tokenizers import decoders, pre_tokenizers, processors, trainers

from models import sizes
from models.errors import InputError
from models.tokenizer import Tokenizer

CORPUS = [
    "def quicksort(items): return sorted(items)  # the quick brown fox jumps",
    "Grüße aus Köln — naïve café, 東京 and 🙂🙂 emoji",
    "The lazy dog sleeps; 3.14159 is pi.\n\n\tindented text\n",
]
TEXTS = [
    "",
    " ",
    "the quick brown fox",
    "unseen wörds: Ωmega 漢字 🚀\n\n  two spaces",
    "a<|end|>b<s>",
    "trailing space ",
]
SPECIALS = ["<s>", "<|end|>", "<|user|>"]
CONFIG = sizes.get("tiny_llama").replace(vocab_size=400)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A byte-level BPE with BOS added by its post-processor, as Llama 3 has."""
    directory = tmp_path_factory.mktemp("tokenizer")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    # Left in many published files, and not wanted when decoding.
    backend.enable_truncation(8)
    backend.enable_padding(length=12, pad_id=1, pad_token="<|end|>")
    backend.save(str(directory / "tokenizer.json"))
    return directory


def settings(path, **fields) -> None:
    special = {"bos_token": "<s>", "eos_token": {"content": "<|end|>", "lstrip": False}}
    content = {"tokenizer_class": "PreTrainedTokenizerFast"} | special | fields
    (path / "tokenizer_config.json").write_text(json.dumps(content))


def copy(directory, target, **fields):
    (target / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    settings(target, **fields)
    return target


def reference(path, **options):
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path / "tokenizer.json"), bos_token="<s>", eos_token="<|end|>", **options
    )


def test_encode_and_decode_as_transformers(directory):
    ours = Tokenizer.from_directory(directory, CONFIG)
    theirs = reference(directory)
    for text in TEXTS + CORPUS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.encode_prompt(text) == theirs.encode(text)
        assert ours.encode_prompt(text) == [0, *ids]
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids) == text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.vocab_size == len(theirs) == 330
    assert ours.decode([*ours.encode("fox"), 399, -1]) == "fox"  # ids of padded embeddings


def test_special_ids(directory, tmp_path):
    ours = Tokenizer.from_directory(copy(directory, tmp_path), CONFIG)
    assert (ours.bos_id, ours.eos_ids) == (0, ())
    ours = Tokenizer.from_directory(tmp_path, CONFIG.replace(eos_token_ids=(1, 2), bos_token_id=5))
    assert (ours.bos_id, ours.eos_ids) == (5, (1, 2))


def test_a_token_without_embedding_is_refused(directory):
    ours = Tokenizer.from_directory(directory, CONFIG.replace(vocab_size=262))
    assert ours.encode("xyz") == reference(directory).encode("xyz", add_special_tokens=False)
    with pytest.raises(InputError, match=r"has id \d+; the model's vocab_size is 262"):
        ours.encode("the quick brown fox")


def test_bytes_when_there_is_no_tokenizer(tmp_path):
    ours = Tokenizer.from_directory(tmp_path, sizes.get("tiny_llama"))
    assert ours.vocab_size == 256 and ours.bos_id is None
    for text in TEXTS + CORPUS:
        assert ours.encode(text) == ours.encode_prompt(text) == list(text.encode())
        assert ours.decode(ours.encode(text)) == text
    assert ours.decode([0x61, 0xFF, 0x62, 0xC3, 300]) == "a\ufffdb\ufffd"
    with pytest.raises(InputError, match=r"vocab_size 255 is too small.*--prompt_ids"):
        Tokenizer.from_directory(tmp_path, sizes.get("tiny_llama").replace(vocab_size=255))


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json"])
def test_unconverted_tokenizers_are_not_taken_for_none(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=rf"{name} without tokenizer.json; write one with"):
        Tokenizer.from_directory(tmp_path, CONFIG)


@pytest.mark.parametrize("content", ["", "{", '{"model": 3}', "\x00\xff"])
def test_corrupt_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer.json: corrupt tokenizer \(") as excinfo:
        Tokenizer.from_directory(tmp_path, CONFIG)
    assert "\n" not in str(excinfo.value)


def test_corrupt_settings(directory, tmp_path):
    copy(directory, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(InputError, match=r"tokenizer_config.json: not readable as JSON"):
        Tokenizer.from_directory(tmp_path, CONFIG)


# Templates in the manner of published ones.
CHATML = (
    "{% for message in messages %}\n"
    "    {%- if loop.first and message['role'] != 'system' %}\n"
    "{{ '<|im_start|>system\\nYou are helpful<|im_end|>\\n' }}\n"
    "    {%- endif %}\n"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}\n"
    "<|im_start|>assistant\n"
    "{% endif %}\n"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
)
HEADERS = (
    "{%- set ns = namespace(system='') %}\n"
    "{%- for m in messages %}\n"
    "    {%- if m.role == 'system' %}{% set ns.system = m.content %}{% continue %}{% endif %}\n"
    "    {{- '<|start|>' ~ m.role ~ '<|sep|>' ~ (m | tojson) ~ eos_token }}\n"
    "{%- endfor %}\n"
    "{%- if tools is not none %}{{- tools | tojson(indent=2) }}{% endif %}\n"
    "{{- '<|system|>' ~ ns.system ~ strftime_now('%Y') ~ (dict(a=1) | tojson) }}\n"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}\n"
)
CHATS = [
    [{"role": "user", "content": "Hello <b>& 'friends'</b>"}],
    [
        {"role": "user", "content": " 2+2? "},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "Grüße\n🙂"},
    ],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
]


@pytest.mark.parametrize("template", [CHATML, INST, HEADERS], ids=["chatml", "inst", "headers"])
@pytest.mark.parametrize("how", ["string", "named", "file"])
def test_chat_templates_as_transformers(directory, tmp_path, template, how):
    if how == "string":
        copy(directory, tmp_path, chat_template=template)
    elif how == "named":
        other = {"name": "tool_use", "template": "x"}
        named = [other, {"name": "default", "template": template}]
        copy(directory, tmp_path, chat_template=named)
    else:
        copy(directory, tmp_path, chat_template="not this one")
        (tmp_path / "chat_template.jinja").write_text(template)
    ours = Tokenizer.from_directory(tmp_path, CONFIG)
    theirs = reference(directory, chat_template=template)
    for chat in CHATS:
        for add in (True, False):
            if template == INST and chat[0]["role"] == "system":
                with pytest.raises(InputError, match="roles must alternate"):
                    ours.apply_chat_template(chat, add_generation_prompt=add)
                continue
            text = ours.apply_chat_template(chat, add_generation_prompt=add)
            expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=add)
            assert text == expected and len(text) > 10


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}{{ messages.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ '{0.__class__.__globals__}'.format(strftime_now) }}",
    "{% import 'os' as os %}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_the_sandbox_holds(directory, tmp_path, template):
    ours = Tokenizer.from_directory(copy(directory, tmp_path, chat_template=template), CONFIG)
    messages = [{"role": "user", "content": "hi"}]
    try:
        text = ours.apply_chat_template(messages)
    except InputError as error:
        assert str(error).startswith("chat template: ") and "\n" not in str(error)
    else:  # jinja2 renders some forbidden attributes as undefined
        assert text == ""
    assert messages == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "Expected an expression"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ range(10**9) | list }}", "[Rr]ange"),
        ("{{ raise_exception('two\nlines') }}", "chat template: two lines"),
        ("{{ messages | tojson(indent=object) }}", "chat template: "),
    ],
)
def test_template_errors(directory, tmp_path, template, message):
    ours = Tokenizer.from_directory(copy(directory, tmp_path, chat_template=template), CONFIG)
    with pytest.raises(InputError, match=message) as excinfo:
        ours.apply_chat_template([{"role": "user", "content": "hi"}])
    assert "\n" not in str(excinfo.value)


def test_template_settings_errors(directory, tmp_path):
    for value, message in [
        ([{"name": "tool_use", "template": "x"}], "no 'default'; it has 'tool_use'"),
        ([3], "must be a string or a list of objects with name and template"),
    ]:
        copy(directory, tmp_path, chat_template=value)
        with pytest.raises(InputError, match=message):
            Tokenizer.from_directory(tmp_path, CONFIG)
    ours = Tokenizer.from_directory(copy(directory, tmp_path), CONFIG)
    with pytest.raises(InputError, match="chat template: the checkpoint has none"):
        ours.apply_chat_template(CHATS[0])
    ours = Tokenizer.from_directory(copy(directory, tmp_path, chat_template=CHATML), CONFIG)
    with pytest.raises(InputError, match="messages: 'hi' must be an object with role"):
        ours.apply_chat_template(["hi"])
