"""A small training run for test_resume.py: `python resume_run.py WORKDIR [STOP_BEFORE_STEP]`.

With a step to stop before, it says so on standard output and waits to be killed. At its end it
prints a hash of everything in the final state.
"""

import hashlib
import random
import signal
import sys
import time

import jax
import numpy as np

from models.config import TransformerConfig
from training import batches, language_model
from training.language_model import TrainConfig
from training.optimizers import OptimizerConfig

CONFIG = TrainConfig(
    model=TransformerConfig(
        vocab_size=64, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8,
        mlp_dim=32, max_position=32, tie_embeddings=True,
    ),
    optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=5),
    num_steps=25,
    batch_size=4,
    sequence_length=32,
    log_every=1,
    eval_every=6,
    checkpoint_every=8,
)  # fmt: skip


class Letters:
    """One id a character."""

    vocab_size = 64
    eos_ids = (63,)

    def encode(self, text: str) -> list[int]:
        return [ord(character) - 65 for character in text]

    def decode(self, ids) -> str:
        return "".join(chr(id + 65) for id in ids)


def documents(seed: int, count: int) -> batches.TokenizedDocuments:
    rng = random.Random(seed)
    texts = ["".join(rng.choices("ABCDEFGH", k=rng.randint(5, 70))) for _ in range(count)]
    return batches.TokenizedDocuments([{"text": text} for text in texts], Letters())


class StopBefore:
    """Batches that stop the process in the middle of the run."""

    def __init__(self, inner, step: int):
        self._inner, self._step, self._seen = inner, step, 0
        self.get_state, self.set_state = inner.get_state, inner.set_state

    def __next__(self):
        self._seen += 1
        if self._seen == self._step:
            # Not signal.pause(): a signal that comes before it would never be seen.
            handler = signal.getsignal(signal.SIGTERM)
            print("waiting", flush=True)
            while signal.getsignal(signal.SIGTERM) is handler:
                time.sleep(0.01)
        return next(self._inner)


def main(workdir: str, stop_before: int = 0) -> None:
    sizes = {"batch_size": CONFIG.batch_size, "seq_len": CONFIG.sequence_length}
    result = language_model.train(
        CONFIG,
        train_batches=StopBefore(
            batches.train_batches(documents(0, 30), seed=3, **sizes), stop_before
        ),
        eval_batches=list(batches.eval_batches(documents(1, 6), **sizes)),
        workdir=workdir,
    )
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(result.state):
        digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    print(digest.hexdigest())


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
