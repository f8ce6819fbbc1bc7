"""MuLo-SD: images drafted at a lower resolution, verified and redrawn locally (arXiv 2601.05149).

    python -m experiments.run --config=experiments/configs/mulo_sd.py:offline --workdir=runs/mulo_sd
    python -m experiments.sweep --config=experiments/configs/mulo_sd.py:offline --workdir=runs/mulo

Presets: `:offline` draws digits of 32 pixels from drafts of 16 (grids 8x8 and 4x4); `:offline64`,
64 from 32; `:offline64x4`, 64 from 16. The default is for models of your own, as directories: the
published pair is 512 pixels from 256 (r = 2), or 1024 from 256 (r = 4), with a 16x tokeniser of
16384 codes. The published threshold, number of pooled codes and radius are not known: these are
ours.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.image_methods import method
from experiments.image_speculation import claim

THRESHOLD, NEIGHBOURS, RADIUS = 0.1, 8, 1
LOCAL, BARE, ISLANDS = "MuLo-SD, l=1", "MuLo-SD, l=0", "MuLo-SD, l=1, islands"
LEARNED, LEARNED_TOKENS = "MuLo-SD, l=1, pixel loss", "MuLo-SD, l=1, token loss"
# Preset: pixels of the target, pixels of the drafter.
OFFLINE = {"offline": (32, 16), "offline64": (64, 32), "offline64x4": (64, 16)}


def get_config(preset: str = "") -> ConfigDict:
    """MuLo-SD beside plain decoding, exact speculation, raster-scan rejection, LANTERN, ZipAR."""
    large, small = OFFLINE.get(preset, (512, 256))
    config = ConfigDict()
    config.name = "mulo_sd" + (f" {preset}" if preset else "")
    config.experiment = "image_speculation"
    config.seed = 0

    # A recipe of training.image_models, or a directory. Methods scale through pixels unless told
    # otherwise: the published default, and training-free.
    config.models = ConfigDict(
        {
            "target": f"digits_ar{large}",
            "draft": f"digits_ar{small}",
            "tokenizer": "digits_vq32",
            "classifier": f"digits_classifier{large}",
            "up": f"digits_up_{small}_{large}",
            "up_tokens": f"digits_up_{small}_{large}_tokens",
            "down": f"digits_down_{small}_{large}",
        }
    )
    config.sizes = ConfigDict({"target": large, "draft": small})
    # Real images that generated ones are compared with.
    config.data = ConfigDict({"dataset": "digit_scenes", "split": "test", "data_dir": ""})
    config.data.builder_options = ConfigDict()
    config.quality = ConfigDict({"num_images": 200, "batch_size": 100, "num_real": 600})
    config.decode = ConfigDict()
    config.decode.temperature = 1.0
    config.decode.top_k = 0
    config.decode.top_p = 1.0
    config.decode.guidance = 2.0
    config.decode.num_timed = 3
    config.decode.repeats = 4
    config.thresholds = (0.0, 0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 1.1)
    if preset not in OFFLINE:
        config.models.update(
            target="checkpoints/target", draft="checkpoints/draft", tokenizer="checkpoints/vq",
            classifier="checkpoints/classifier", up="", up_tokens="", down="",
        )  # fmt: skip
        config.data.update(dataset="imagenet2012", split="validation")
        config.quality.update(num_images=5000, batch_size=32, num_real=5000)
        config.decode.update(top_k=2000, guidance=4.0, num_timed=20)
    config.decode.methods = methods(trained=bool(config.models.up))
    config.curves = (
        _raster("raster-scan rejection"),
        _local("local, l=0", radius=0),
        _local("local, l=1"),
        _local("local, l=2", radius=2),
    )
    config.claims = claims(trained=bool(config.models.up))
    if preset.startswith("offline64"):
        # How the speed-up moves with resolution and factor: fewer methods.
        shown = ("plain", "raster-scan rejection", LOCAL, BARE)
        config.models.update(up="", up_tokens="", down="")
        config.decode.methods = tuple(m for m in methods() if m.label in shown)
        # One image at a time, as in the timing: a shape less to compile.
        config.quality.update(num_images=100, batch_size=1)
        config.curves = ()
        config.claims = tuple(c for c in config.claims if {c.label, c.over} <= set(shown))
    return config


def methods(*, trained: bool = True) -> tuple[ConfigDict, ...]:
    """The comparison at one threshold; the last ones with learned up-samplers."""
    learned: tuple[ConfigDict, ...] = (
        _local(LEARNED, scaling="up"),
        _local(LEARNED_TOKENS, scaling="up_tokens"),
        _local("all drafts, pixel loss", 0.0, scaling="up"),
        _local("all drafts, token loss", 0.0, scaling="up_tokens"),
        _local("all drafts, pixels", 0.0),
    )
    if not trained:
        learned = ()
    return (
        method("plain", "plain"),
        method("exact speculation", "raster", rule="exact_match"),
        _raster("raster-scan rejection"),
        method("LANTERN's rule", "raster", THRESHOLD, rule="lantern", neighbours=11),
        method("ZipAR, w=4", "wavefront", width=4),
        method("ZipAR, w=2", "wavefront", width=2),
        _local(BARE, radius=0),
        _local(LOCAL),
        _local("MuLo-SD, l=2", radius=2),
        _local(ISLANDS, resampling="islands"),
        _local("MuLo-SD, l=1, stale", refresh=False),
        *learned,
    )


def claims(*, trained: bool = True) -> tuple[ConfigDict, ...]:
    """What the paper says of these, at one threshold."""
    main, bare, islands = LOCAL, BARE, ISLANDS
    raster, exact = "raster-scan rejection", "exact speculation"
    calls, frechet = "tokens_per_target_call", "frechet"
    pixel, token = "all drafts, pixel loss", "all drafts, token loss"
    of_samplers: tuple[ConfigDict, ...] = ()
    if trained:
        of_samplers = (claim("pixel loss beats token loss", frechet, pixel, token, at_most=1.0),)
    return (
        claim("local beats raster-scan rejection", calls, bare, raster, at_least=1.0),
        claim("local beats raster-scan rejection", calls, main, raster, at_least=1.0),
        claim("local beats raster-scan rejection", calls, islands, raster, at_least=1.0),
        claim("local is faster than raster-scan", "speedup", main, raster, at_least=1.0),
        claim("expansion recovers quality", frechet, main, bare, at_most=0.0, ratio=False),
        claim("at a small part of the tokens", "rho", main, bare, at_most=0.15, ratio=False),
        claim("exact speculation hardly pays", "speedup", exact, "plain", at_most=1.1),
        claim("islands cut serial calls", "resample_calls", islands, main, at_most=1.0),
        claim("islands keep quality", "accuracy", islands, main, at_least=-0.03, ratio=False),
        claim("islands are no slower", "speedup", islands, main, at_least=1.0),
        claim("MuLo-SD is faster than plain decoding", "speedup", main, "plain", at_least=1.0),
        claim("at equal class accuracy", "accuracy", main, "plain", at_least=-0.03, ratio=False),
        *of_samplers,
    )


def _raster(label: str, **options: Any) -> ConfigDict:
    options = {"rule": "pooled_threshold", "neighbours": NEIGHBOURS} | options
    return method(label, "raster", THRESHOLD, **options)


def _local(label: str, threshold: float = THRESHOLD, **options: Any) -> ConfigDict:
    options = {"radius": RADIUS, "neighbours": NEIGHBOURS} | options
    return method(label, "local", threshold, **options)


def sweep() -> list[dict[str, object]]:
    """Pooled codes, radius and threshold; the way between the grids."""
    plain = method("plain", "plain")
    quiet: dict[str, object] = {"curves": (), "claims": (), "decode.repeats": 1}
    return [
        quiet
        | {
            "name": f"k={k}, l={radius}",
            "decode.methods": (
                plain,
                *(
                    _local(f"tau={tau:g}", tau, radius=radius, neighbours=k)
                    for tau in (0.05, 0.1, 0.2, 0.4)
                ),
            ),
        }
        for k in (1, 4, 8)
        for radius in (0, 1, 2)
    ]
