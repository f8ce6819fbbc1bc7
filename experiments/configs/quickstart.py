"""Three ways to decode the same model: what `make demo` runs.

    python -m experiments.run --config=experiments/configs/quickstart.py --workdir=runs/quickstart

Trains a small code model and its draft on the Python standard library's source (once; they are
cached), decodes held-out files with plain decoding, n-gram lookup and draft-model speculation, and
checks on the spot that both keep the target's distribution. `:smoke` is the same with tiny models
and few tokens.
"""

from ml_collections import ConfigDict

from experiments.config_parts import claim, comparison, method


def get_config(preset: str = "") -> ConfigDict:
    """The quick start; `preset` is '' or 'smoke'."""
    smoke = preset == "smoke"
    config = comparison("quickstart")
    if smoke:
        config.models.target, config.models.draft = "tiny_target", "tiny_draft"
    config.data.num_prompts = 4
    config.decode.batch_sizes = (1, 4)
    config.decode.max_new_tokens = 16 if smoke else 40
    config.decode.repeats = 1 if smoke else 3
    config.decode.methods = (
        method("plain", "autoregressive"),
        method("prompt lookup", "prompt_lookup", num_draft=4, max_ngram=3),
        method("draft model", "speculative_sampling", num_draft=4),
    )
    config.lossless.update(samples=512, batch_size=256)
    if not smoke:
        config.claims = (claim("draft model", "speedup", 1.0, temperature=0.0),)
    return config
