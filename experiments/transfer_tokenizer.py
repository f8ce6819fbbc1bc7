"""Gives a checkpoint another tokeniser and writes it as an ordinary Hugging Face directory.

    python -m experiments.transfer_tokenizer --checkpoint=DIR --tokenizer=DIR --hypernetwork=DIR \
        --output=NEW_DIR
    python -m experiments.transfer_tokenizer --checkpoint=DIR --tokenizer=DIR --heuristic=fvt \
        --output=NEW_DIR

The new tokeniser is brought into byte-level normal form; the model's special tokens keep their ids
and rows. Then `experiments.generate --checkpoint=NEW_DIR` decodes with it, and transformers'
`AutoTokenizer` and `AutoModelForCausalLM` open it. `--variant=DIR` writes a fine-tuned variant of
the checkpoint with the tables instead. Hypernetworks come from `training.hypernetwork_recipes`.
"""

import json

from absl import flags

from experiments import cli
from models.errors import InputError, check_choice

FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "checkpoint", None, "Directory of the model, or a named base model.", flag_values=FLAGS
)
flags.DEFINE_string(
    "tokenizer", None, "Directory with the tokenizer.json to give it.", flag_values=FLAGS
)
_HYPERNETWORK = flags.DEFINE_string(
    "hypernetwork", None, "Directory of a hypernetwork trained for the model.", flag_values=FLAGS
)
_HEURISTIC = flags.DEFINE_string(
    "heuristic",
    None,
    "Instead of a hypernetwork: random, lexical, fvt, focus or ofa.",
    flag_values=FLAGS,
)
_TEXTS = flags.DEFINE_string(
    "texts", None, "For focus and ofa: files (a glob) that company is counted on.",
    flag_values=FLAGS,
)  # fmt: skip
_VARIANT = flags.DEFINE_string(
    "variant", None, "Directory of a fine-tuned variant that takes the tables.", flag_values=FLAGS
)
_SHARE = flags.DEFINE_float(
    "share", 0.5, "Of what further training changed that the variant takes.", flag_values=FLAGS
)
_PRE_TOKENIZATION = flags.DEFINE_string(
    "pre_tokenization", "gpt2", "How texts are cut: gpt2, or own (byte-level tokenisers).",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string("output", None, "Directory to write.", flag_values=FLAGS)


def main(argv: list[str]) -> None:
    cli.no_arguments(argv)
    checkpoint, tokenizer, output = map(_required, ("checkpoint", "tokenizer", "output"))
    if (_HYPERNETWORK.value is None) == (_HEURISTIC.value is None):
        raise InputError("--hypernetwork, --heuristic: give one of them")
    from models import byte_level, embedding_heuristics, files, token_tables
    from models import hypernetwork as network
    from models.safetensors_io import read_json
    from training import hypernetwork_recipes, tokenizer_transfer
    from training.datasets import text_files

    directory = hypernetwork_recipes.resolve(checkpoint, files.cache_root())
    base = hypernetwork_recipes.load_base(directory)
    form = tokenizer_transfer.target_form(
        base, byte_level.read(tokenizer), pre_tokenization=_PRE_TOKENIZATION.value
    )
    if _HYPERNETWORK.value is not None:
        config, params = network.load(_HYPERNETWORK.value)
        lost = tokenizer_transfer.surfaces_of(base, form, config).num_truncated
        swapped = tokenizer_transfer.with_hypernetwork(base, form, config, params)
        told = f"{lost} tokens longer than {config.max_surface} of the model's own were cut"
    else:
        heuristic = _required("heuristic")
        check_choice("--heuristic", heuristic, embedding_heuristics.HEURISTICS)
        found = text_files.find_files(_TEXTS.value) if _TEXTS.value else {}
        texts = [path.read_text(encoding="utf-8") for path in found.values()]
        swapped = tokenizer_transfer.with_heuristic(base, form, heuristic, texts=texts)
        both = int((byte_level.overlap(base.form, form) >= 0).sum())
        told = f"{both} tokens were the model's own"
    if _VARIANT.value is not None:
        variant = hypernetwork_recipes.load_base(_VARIANT.value)
        moved = token_tables.transfer_to_variant(
            base.params, swapped.params, variant.params, _SHARE.value
        )
        swapped = swapped._replace(params=moved)
    settings = directory / "tokenizer_config.json"
    tokenizer_transfer.save(
        output, swapped, settings=read_json(settings) if settings.is_file() else {}
    )
    sizes = [base.config.vocab_size, form.vocab_size]
    print(json.dumps({"output": output, "vocab_size": sizes, "note": told}))


def _required(name: str) -> str:
    value = FLAGS[name].value
    if value is None:
        raise InputError(f"--{name}: missing")
    return str(value)


if __name__ == "__main__":
    cli.run_main(main, FLAGS)
