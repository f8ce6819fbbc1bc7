"""Chimera: text, law, drafts and entries against plain loops, for heads that say anything."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import generation, loop
from decoding.sampling import SamplingConfig
from decoding.speculative import chimera, medusa, trigram_states
from decoding.speculative.method import speculative
from decoding.speculative.template import from_paths
from models import chimera_heads, transformer
from models.chimera_heads import ChimeraConfig, ChimeraHeads
from models.errors import InputError
from tests.decoding import exact_laws, tiny
from tests.decoding.chimera_reference import Encoder, hidden_states

TREE = "0 1 2 00 01 10 000 001"
TEMPLATE = from_paths(medusa.paths_of(TREE, 3))
FULL = ChimeraConfig(3)
OWN = ChimeraConfig(3, own_head=True, draft_states=False)
BARE = ChimeraConfig(3, trigram=False, context=False, residual=False)


@functools.cache
def heads(config: ChimeraConfig = FULL, target: Any = tiny.TARGET) -> ChimeraHeads:
    """Random values everywhere, where training would begin with zeros and ones too."""
    fresh = chimera_heads.fresh(config, target, jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), fresh)


def models(config: ChimeraConfig = FULL, target: Any = tiny.TARGET) -> dict[str, Any]:
    return {"target": tiny.params(target)["target"], "chimera_heads": heads(config, target)}


def build(temperature: float = 0.0, /, **options: Any) -> loop.Method:
    return tiny.build("chimera", temperature, **{"heads": 3, "tree": TREE, **options})


def decode(method: loop.Method, config: ChimeraConfig = FULL, **more: Any) -> list:
    return generation.generate(models(config), tiny.PROMPTS, method, tiny.STOP, **more)


# --- Text --------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [FULL, BARE], ids=["full", "bare"])
def test_text_is_plain_decodings_whatever_the_heads_say(config):
    rows = decode(build(), config)
    assert tuple(map(tuple, tiny.texts(rows))) == tiny.plain_greedy()
    for row in rows:
        calls = row.stats["target_calls"]
        assert row.stats["target_positions"] == TEMPLATE.num_nodes * calls
        assert row.stats["draft_calls"] == TEMPLATE.max_depth * calls


def test_a_table_of_trigrams_changes_nothing_and_is_asked_less_in_vain_as_text_grows():
    method = build(trigram_places=256)
    found = decode(method)
    for row, other in zip(found, decode(build()), strict=True):
        assert row.token_ids == other.token_ids
        assert {name: row.stats[name] for name in other.stats} == other.stats
    state, slots = generation.begin(models(), tiny.PROMPTS, method, tiny.STOP)
    shares = []
    for _ in range(2):
        state, slots = generation.advance(models(), state, slots, method, tiny.STOP, rounds=6)
        asked, known = (int(state.stats.extra[n].sum()) for n in ("trigrams", "trigrams_known"))
        shares.append(known / asked)
    known, asked = (sum(r.stats[n] for r in found) for n in ("trigrams_known", "trigrams"))
    assert 0 < shares[0] < shares[1] < known / asked < 1


def test_sampled_text_is_plain_decodings_and_no_row_depends_on_another():
    method = build(1.0)
    rows = decode(method, seed=5)
    plain = tiny.decode(tiny.build("autoregressive", 1.0), seed=5)
    assert tiny.texts(rows) == tiny.texts(plain)
    assert sum(sum(row.stats["accepted"]) for row in rows) > 0
    alone = generation.generate(models(), tiny.PROMPTS[2:3], method, tiny.STOP, seed=5, row_ids=[2])
    assert alone[0].token_ids == rows[2].token_ids
    assert alone[0].stats == rows[2].stats


def test_the_law_is_the_targets():
    config, sampling, eos = tiny.SMALL, SamplingConfig(temperature=0.8), (4,)
    model = models(FULL, config)
    drafter = chimera.chimera_drafter(config, TEMPLATE)
    method = speculative("chimera", config, drafter, "exact_match", sampling)
    counts = exact_laws.sampled(method, eos, models=model)
    laws = exact_laws.laws(sampling, eos, config, model["target"])
    assert exact_laws.p_value(counts, laws) > 1e-3


# --- Drafts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [FULL, OWN], ids=["full", "own"])
def test_drafts_and_entries_are_those_of_plain_loops_on_true_states(config):
    """After every round, rows having advanced by different amounts: each node of the tree is its
    head's choice, and what is kept of verified tokens is made of the target's states and of
    trigrams of the text."""
    target, model = tiny.SMALL, models(config, tiny.SMALL)  # whose drafts are right now and then
    drafter = chimera.chimera_drafter(target, TEMPLATE)
    method = speculative("chimera", target, drafter, "exact_match", SamplingConfig())
    prompts = tiny.prompts((9, 1, 17, 2), vocab=target.vocab_size)
    state = tiny.start(method, model, prompts, slots=64, buffer=64)
    ask = jax.jit(lambda s: drafter.propose(model, s.inner.drafter, s))
    reference = Encoder(target, model["target"], model["chimera_heads"])
    siblings, moved = [], []
    for _ in range(4):
        draft = ask(state)
        for b, length in enumerate(np.asarray(state.lengths)):
            text = np.asarray(state.tokens)[b, :length].tolist()
            if length == 1:
                assert not bool(draft.tree.valid[b, 1:].any())
                continue
            assert bool(draft.tree.valid[b].all())
            hidden = hidden_states(target, model["target"], text[:-1])
            tokens = np.asarray(draft.tree.tokens)[b]
            check_tree(reference, text, hidden, tokens)
            cache = draft.inner.cache
            kept = [np.asarray(cache.keys), np.asarray(cache.values)]
            for which, first, entries in (
                (0, 0, reference.states(hidden)),
                (1, 1, reference.trigrams(text)),
            ):
                for p, entry in enumerate(entries, start=first):
                    for mine, theirs in zip(kept, entry, strict=True):
                        np.testing.assert_allclose(mine[which][b, :, p], theirs, atol=1e-4)
            number = {path: node for node, path in enumerate(TEMPLATE.paths)}
            siblings.append(tokens[number[0, 0]] != tokens[number[1, 0]])
        before = np.asarray(state.lengths)
        state = loop.advance(
            model, state, jnp.int32(state.rounds + 1), method=method, stop=tiny.STOP, slots=64
        )
        moved += (np.asarray(state.lengths) - before).tolist()
    # What follows a draft depends on the draft: Medusa's do not.
    assert np.mean(siblings) > 0.3
    assert min(moved) == 1 and max(moved) > 2


def check_tree(reference: Encoder, text: list, hidden: np.ndarray, tokens: np.ndarray) -> None:
    lineage = {0: []}
    for node in range(1, TEMPLATE.num_nodes):
        above = TEMPLATE.parent[node]
        lineage[node] = [*lineage[above], int(tokens[node])]
        logits, _ = reference.draft(text, hidden, lineage[above])[-1]
        assert np.argsort(-logits)[TEMPLATE.rank[node]] == tokens[node]


def test_a_level_is_one_call_on_its_nodes_with_children(monkeypatch):
    widths, encode = [], chimera_heads.encode

    def counted(target: Any, params: Any, x: jnp.ndarray, *more: Any) -> jnp.ndarray:
        widths.append(x.shape[1])
        return encode(target, params, x, *more)

    monkeypatch.setattr(chimera_heads, "encode", counted)
    method = build()
    state = tiny.start(method, models(), tiny.PROMPTS, slots=64, buffer=64)
    drafter = chimera.chimera_drafter(tiny.TARGET, TEMPLATE)
    jax.eval_shape(lambda s: drafter.propose(models(), s.inner.drafter, s).tree, state)
    assert widths == [1, 2, 1]  # the root, "0" and "1", and "00"


# --- Heads and encoders ------------------------------------------------------------------------


def test_fresh_heads_add_to_the_target_and_heads_are_written_and_read(tmp_path):
    rng = np.random.default_rng(0)
    hidden, z = (jnp.asarray(rng.normal(size=(2, 16)), jnp.float32) for _ in range(2))
    target = tiny.params()["target"]
    for own in (False, True):
        config = ChimeraConfig(2, own)
        fresh = chimera_heads.init(config, tiny.TARGET, jax.random.key(0))
        fresh = chimera_heads.with_head(tiny.TARGET, target, fresh)
        for k in range(2):
            for drafted in (z, jnp.zeros_like(z)):  # with Z = 0 a head is the target's
                said = chimera_heads.logits(config, tiny.TARGET, target, fresh, k, hidden, drafted)
                wanted = transformer.unembed(tiny.TARGET, target, hidden + drafted)
                np.testing.assert_allclose(said, wanted, atol=1e-5)
        chimera_heads.save(tmp_path / str(own), config, fresh)
        found, params = chimera_heads.load(tmp_path / str(own), tiny.TARGET)
        assert found == config
        jax.tree.map(np.testing.assert_array_equal, params, fresh)


def test_trigrams_know_their_order_and_where_the_text_begins():
    target, mine = tiny.params()["target"], heads()

    def say(*ids: int) -> np.ndarray:
        found = chimera_heads.trigram(
            FULL, tiny.TARGET, target, mine.params, jnp.asarray([ids], jnp.int32)
        )
        return np.asarray(found[0])

    assert np.abs(say(3, 4, 5) - say(4, 3, 5)).max() > 1e-2
    ids = chimera_heads.trigram_ids(*jnp.asarray([[7, 1, 2], [1, 2, 3], [2, 3, 4]]), jnp.arange(3))
    assert ids.tolist() == [[2, 2, 2], [2, 3, 3], [2, 3, 4]]


def test_twelve_squares_a_layer_and_heads():
    D, V = tiny.TARGET.embed_dim, tiny.TARGET.vocab_size

    def size(tree: Any) -> int:
        return sum(x.size for x in jax.tree.leaves(tree))

    params = heads(ChimeraConfig(4, own_head=True)).params
    assert size(params["trigram"]) == 12 * D**2 + 3 * D
    assert size(params["head"]) == 4 * 2 * D * V
    layer = size(tiny.params()["target"]["layers_0"])
    assert size(params["context"]) == layer


def test_a_table_keeps_the_newest_of_what_shares_a_place():
    table = trigram_states.create(2, 1, 2, jnp.float32)  # one place: everything shares it
    ids = jnp.asarray([[[1, 2, 3], [4, 5, 6]], [[4, 5, 6], [1, 2, 3]]])
    states = jnp.arange(8.0).reshape(2, 2, 2)
    usable = jnp.asarray([[True, True], [True, False]])
    table = trigram_states.add(table, ids, states, usable)
    found, there = trigram_states.find(table, ids)
    assert there.tolist() == [[False, True], [True, False]]
    np.testing.assert_array_equal(found[0, 1], states[0, 1])
    np.testing.assert_array_equal(found[1, 0], states[1, 0])
    table = trigram_states.create(1, 64, 2, jnp.float32)
    many = jnp.asarray(np.random.default_rng(0).integers(0, 9, (1, 40, 3)))
    values = many[..., :2].astype(jnp.float32)
    found, there = trigram_states.find(
        trigram_states.add(table, many, values, jnp.ones((1, 40), bool)), many
    )
    assert 10 < int(there.sum()) < 40
    np.testing.assert_array_equal(found[there], values[there])


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="heads: 0 must be at least 1"):
        ChimeraConfig(0)
    with pytest.raises(InputError, match="tree: rank 64 in a vocabulary of 64"):
        chimera.chimera_drafter(tiny.TARGET, from_paths([(i,) for i in range(65)]))
    with pytest.raises(InputError, match="heads: a tree of 3 levels needs as many; these are 2"):
        generation.generate(models(ChimeraConfig(2)), [[1, 2]], build(), tiny.STOP)
