"""Hugging Face `generate` on the same checkpoint: what the baseline suite is measured against."""

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from models import hf_checkpoint, transformer
from models.config import TransformerConfig


def hugging_face(config: TransformerConfig, params: transformer.Params) -> Any:
    """The model in `transformers`, read from a checkpoint that this project writes."""
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as directory:
        hf_checkpoint.save(directory, config, params)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval()


def greedy(
    model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, threads: int
) -> Callable[[], list[list[int]]]:
    """A callable that greedily generates exactly `new_tokens` for prompts of equal length."""
    import torch

    ids = torch.tensor(prompts)

    def run() -> list[list[int]]:
        torch.set_num_threads(threads)
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return out[:, ids.shape[1] :].tolist()

    return run
