"""HAT from the command line: JSON, streaming, meshes, prompts of different lengths."""

import json

import pytest

from decoding import generation, methods, stopping
from decoding.sampling import SamplingConfig
from experiments.generate import FLAGS, main
from models import hierarchical
from models.errors import InputError
from models.hierarchical import DOCUMENT_END, WORD_END
from models.word_tokenizer import WordTokenizer
from tests.models.tiny_hierarchical import HAT, params

TEXTS = ("the cat sat", "für Überlängen und mehr")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hat") / "model"
    hierarchical.save(directory, HAT, params())
    return directory


def run(checkpoint, capsys, *flags, method="hat"):
    FLAGS.unparse_flags()
    FLAGS(["generate", f"--checkpoint={checkpoint}", f"--method={method}", *flags])
    try:
        main([])
    finally:
        FLAGS.unparse_flags()
    return capsys.readouterr().out


def test_rows_are_those_of_the_loop_and_text_is_never_broken(checkpoint, capsys):
    prompts = [f"--prompt={text}" for text in TEXTS]
    flags = ("--json", "--max_new_tokens=24", "--temperature=1.2")
    lines = run(checkpoint, capsys, *prompts, *flags, "--mesh=2x2").splitlines()
    found = [json.loads(line) for line in lines]
    tokenizer = WordTokenizer(HAT)
    expected = generation.generate(
        {"target": params()},
        [tokenizer.encode(text) for text in TEXTS],
        methods.build("hat", {"target": HAT}, SamplingConfig(temperature=1.2)),
        stopping.StopConfig(24, (DOCUMENT_END,)),
    )
    for line, row, text in zip(found, expected, TEXTS, strict=True):
        assert line["prompt_ids"] == row.prompt_ids
        assert line["token_ids"] == row.token_ids
        assert tokenizer.decode(line["prompt_ids"]) == text
        written = bytes(i for i in row.token_ids if i not in (WORD_END, DOCUMENT_END))
        assert line["text"].rstrip("\ufffd") == written.decode(errors="replace").rstrip("\ufffd")
        assert "\ufffd" not in line["text"].rstrip("\ufffd")
        assert line["stats"]["decoder_calls"] == len(row.token_ids)


def test_what_is_streamed_is_the_text(checkpoint, capsys):
    flags = (f"--prompt={TEXTS[0]}", "--max_new_tokens=24")
    streamed = run(checkpoint, capsys, *flags, "--stream")
    whole = run(checkpoint, capsys, *flags, "--json", "--method_option=draft=ngram")
    assert f"\n{json.loads(whole)['text']}\n---" in streamed


def test_other_methods_name_what_they_need(checkpoint, capsys):
    with pytest.raises(InputError, match="models of words; allowed: models of tokens"):
        run(checkpoint, capsys, "--prompt=a", method="autoregressive")
    with pytest.raises(InputError, match="prompt 0: token id 256 is out of range"):
        run(checkpoint, capsys, "--prompt_ids=256")
    with pytest.raises(InputError, match="chat template: the checkpoint has none"):
        run(checkpoint, capsys, "--prompt=a", "--chat")
