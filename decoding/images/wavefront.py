"""Row-wavefront decoding of images (ZipAR): every open row advances by one token a call.

He et al., 'ZipAR: Accelerating Autoregressive Image Generation through Spatial Locality', arXiv
2412.04062. A row opens when the row above is `width` tokens ahead. Its first token needs the last
of the row above as input, which is not there yet: the last token of the newest complete row stands
in for it, and the cache slot is written again once the true token is known. Training-free, not
lossless; width n is plain raster decoding.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from decoding import randomness
from decoding.images import image_tokens
from decoding.images.image_tokens import ImageSampler
from models import cache as kv
from models import transformer
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Who advances when. Positions are relative to the first code of the first row.

    Attributes:
      decides: int [steps, A + 1], the code that each query decides; -1 for a query that decides
        nothing. The last query of a step is for the true end of a row that has arrived late.
      reads: int [steps, A + 1], the code whose token is the query's input; -1 is the one before
        the first row.
      writes: int [steps, A + 1], the code whose slot the query stands in; -2 for no query.
    """

    decides: np.ndarray
    reads: np.ndarray
    writes: np.ndarray

    @property
    def steps(self) -> int:
        return len(self.decides)

    def written(self, num_codes: int) -> np.ndarray:
        """Codes whose slots have been written by the end of each step: bool [steps, num_codes]."""
        now = (self.writes[:, :, None] == np.arange(num_codes)).any(axis=1)
        return np.logical_or.accumulate(now, axis=0)


NO_QUERY = -2


def schedule(rows: int, side: int, width: int, *, first_row_serial: bool = True) -> Schedule:
    """The order in which `rows` rows of `side` tokens are decoded.

    Args:
      rows: rows to decode.
      side: n.
      width: w, tokens by which the row above must be ahead, 1 .. n.
      first_row_serial: the second row waits for the whole first row, as in the official code;
        else all rows open w steps apart and the whole takes n + (rows - 1) w steps.

    Raises:
      InputError: a width out of range.
    """
    if not 1 <= width <= side:
        raise InputError(f"width: {width} must be between 1 and the side {side}")
    head = side if first_row_serial else width
    opens = [0] + [head + (row - 1) * width for row in range(1, rows)]
    steps = opens[-1] + side
    lanes = min(rows, -(-side // width))
    decides = np.full((steps, lanes + 1), -1)
    reads, writes = np.zeros((2, steps, lanes + 1), int)
    writes[:] = NO_QUERY
    for step in range(steps):
        lane = 0
        for row in range(rows):
            column = step - opens[row]
            if not 0 <= column < side:
                continue
            code = row * side + column
            decides[step, lane], writes[step, lane] = code, code - 1
            complete = [r for r in range(row) if opens[r] + side <= step]
            stand_in = (complete[-1] + 1) * side - 1 if complete else -1
            reads[step, lane] = code - 1 if column else stand_in
            lane += 1
        for row in range(rows - 1):
            if step == opens[row] + side and opens[row + 1] < step:
                writes[step, -1] = reads[step, -1] = (row + 1) * side - 1
    return Schedule(decides, reads, writes)


@functools.partial(jax.jit, static_argnames=("sampler", "width", "first_row_serial"))
def generate(
    params: transformer.Params,
    labels: jnp.ndarray,
    keys: jax.Array,
    *,
    sampler: ImageSampler,
    width: int,
    first_row_serial: bool = True,
) -> jnp.ndarray:
    """Codes int32 [B, N] of images of classes int [B]; as many calls as the schedule has steps."""
    n = sampler.side
    order = schedule(n, n, width, first_row_serial=first_row_serial)
    tokens = image_tokens.blank(sampler, labels)
    cache = image_tokens.create_cache(sampler, len(labels))
    logits, cache = image_tokens.feed(sampler, params, cache, tokens[:, :1], jnp.int32(0))
    first = jnp.int32(0)
    tokens, _ = span(sampler, params, cache, tokens, logits[:, 0], keys, first, order)
    return tokens[:, 1:]


def span(
    sampler: ImageSampler,
    params: transformer.Params,
    cache: kv.KVCache,
    tokens: jnp.ndarray,
    logits: jnp.ndarray,
    keys: jax.Array,
    first: jnp.ndarray,
    order: Schedule,
    purpose: int = randomness.SAMPLE,
) -> tuple[jnp.ndarray, kv.KVCache]:
    """Draws the rows of a schedule from code `first` on, in `order.steps` - 1 calls.

    Arguments and results are those of `raster.span`.
    """
    tables = [jnp.asarray(table) for table in (order.decides, order.reads, order.writes)]
    written = jnp.asarray(order.written(sampler.num_tokens))
    B = len(tokens)

    def visible(number: jnp.ndarray) -> jnp.ndarray:
        """What rows above have not reached yet holds nothing: bool [S]."""
        slot = jnp.arange(cache.slots) - first - 1
        inside = written[number, jnp.clip(slot, 0, sampler.num_tokens - 1)]
        return (slot < 0) | inside

    def decide(tokens: jnp.ndarray, logits: jnp.ndarray, code: jnp.ndarray) -> jnp.ndarray:
        """Codes [A] from logits [B, A, V]; code -1 is none."""
        position = jnp.broadcast_to(first + 1 + code, (B, len(code)))
        drawn = image_tokens.draw(sampler, logits, keys, position, purpose)
        place = jnp.where(code >= 0, position, tokens.shape[1])
        rows = jnp.arange(B)[:, None]
        return tokens.at[rows, place].set(drawn, mode="drop")

    def step(
        number: jnp.ndarray, carry: tuple[jnp.ndarray, kv.KVCache]
    ) -> tuple[jnp.ndarray, kv.KVCache]:
        tokens, cache = carry
        decides, reads, writes = (table[number] for table in tables)
        inputs = tokens[:, first + 1 + reads]
        at = jnp.broadcast_to(first + 1 + writes, inputs.shape)
        valid = jnp.broadcast_to(writes != NO_QUERY, inputs.shape)
        logits, cache = image_tokens.feed_scattered(
            sampler, params, cache, inputs, at, valid, visible(number)
        )
        return decide(tokens, logits, decides), cache

    tokens = decide(tokens, logits[:, None], jnp.zeros(1, jnp.int32))
    return jax.lax.fori_loop(1, order.steps, step, (tokens, cache))
