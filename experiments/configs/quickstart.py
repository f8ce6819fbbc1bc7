"""Three ways to decode the same model: what `make demo` runs.

    python -m experiments.run --config=experiments/configs/quickstart.py --workdir=runs/quickstart

Trains a small code model and its draft on the Python standard library's source (once; they are
cached), decodes held-out files with plain decoding, n-gram lookup and draft-model speculation, and
checks on the spot that both keep the target's distribution. `:smoke` is the same with tiny models
and few tokens.
"""

from ml_collections import ConfigDict


def get_config(preset: str = "") -> ConfigDict:
    """The quick start; `preset` is '' or 'smoke'."""
    smoke = preset == "smoke"
    config = ConfigDict()
    config.experiment = "comparison"
    config.name = "quickstart"
    config.seed = 0

    # A base model's name (see training/base_models.py) or a Hugging Face checkpoint directory.
    config.models = ConfigDict()
    config.models.target = "tiny_target" if smoke else "code_target"
    config.models.draft = "tiny_draft" if smoke else "code_draft"

    config.data = ConfigDict()
    config.data.dataset = "stdlib_code"
    config.data.split = "test"
    config.data.num_prompts = 4
    config.data.prompt_tokens = 64
    config.data.builder_options = ConfigDict()

    config.decode = ConfigDict()
    config.decode.temperatures = (0.0, 1.0)
    config.decode.top_k = 0
    config.decode.top_p = 1.0
    config.decode.batch_sizes = (1, 4)
    config.decode.max_new_tokens = 16 if smoke else 96
    config.decode.repeats = 1 if smoke else 3
    # The first method is the baseline of the speed-ups.
    config.decode.methods = (
        _method("plain", "autoregressive"),
        _method("prompt lookup", "prompt_lookup", num_draft=4, max_ngram=3),
        _method("draft model", "speculative_sampling", num_draft=4),
    )

    config.lossless = ConfigDict()
    config.lossless.samples = 1024 if smoke else 2048
    config.lossless.batch_size = 512

    config.claims = ()
    if not smoke:
        config.claims = (_claim("draft model", 0.0, 1, "speedup", 1.0),)
    return config


def _method(label: str, method: str, **options: object) -> ConfigDict:
    return ConfigDict({"label": label, "method": method, "options": options})


def _claim(
    label: str, temperature: float, batch_size: int, metric: str, at_least: float
) -> ConfigDict:
    return ConfigDict(
        {
            "label": label,
            "temperature": temperature,
            "batch_size": batch_size,
            "metric": metric,
            "at_least": at_least,
        }
    )
