"""Tree methods: plain greedy at temperature 0, the exact law of whole texts above."""

import pytest

from decoding.sampling import SamplingConfig
from tests.decoding import tiny
from tests.decoding.exact_laws import EOS, laws, p_value, sampled, small

GREEDY = [
    ("spectr", {"num_sequences": 3, "length": 3}),
    ("spectr", {"num_sequences": 3, "length": 3, "layout": "separate"}),
    ("rsd_c", {"branching": "3-2-1"}),
    ("rsd_s", {"width": 3, "depth": 3}),
    ("rsd_s", {"width": 3, "depth": 3, "source": "ngram"}),
    ("dyspec", {"budget": 8}),
    ("dyspec", {"budget": 8, "construction": "heap"}),
    ("top_tree", {"branching": "3-2-1"}),
]


@pytest.mark.parametrize("name,options", GREEDY, ids=str)
def test_at_temperature_zero_every_tree_gives_plain_greedy(name, options):
    rows = tiny.decode(tiny.build(name, **options))
    assert tuple(map(tuple, tiny.texts(rows))) == tiny.plain_greedy()
    accepted, proposed = (
        sum(sum(row.stats[field]) for row in rows) for field in ("accepted", "proposed")
    )
    assert 0 < accepted < proposed


T1 = SamplingConfig(1.0)
HOT = SamplingConfig(1.4)
NUCLEUS = SamplingConfig(1.2, top_p=0.8)
SAMPLED = [
    ("spectr", T1, {"num_sequences": 3, "length": 2}, ()),
    ("spectr", NUCLEUS, {"num_sequences": 2, "length": 2, "layout": "separate"}, (EOS,)),
    ("spectr", T1, {"num_sequences": 3, "length": 2, "rule": "multi_round"}, ()),
    ("rsd_c", T1, {"branching": "2-2"}, ()),
    ("rsd_c", NUCLEUS, {"branching": "3-1"}, ()),
    ("rsd_c", HOT, {"branching": "2-1-1", "draft_temperature": 0.7}, (EOS,)),
    ("rsd_s", T1, {"width": 2, "depth": 2}, ()),
    ("rsd_s", NUCLEUS, {"width": 3, "depth": 2}, (EOS,)),
    ("rsd_s", T1, {"width": 3, "depth": 2, "source": "ngram"}, ()),
    ("dyspec", T1, {"budget": 5, "threshold": 0.15}, ()),
    ("dyspec", HOT, {"budget": 4, "threshold": 0.05, "draft_temperature": 0.6}, (EOS,)),
    ("dyspec", T1, {"budget": 5, "construction": "heap"}, ()),
    ("dyspec", NUCLEUS, {"budget": 4, "construction": "heap", "source": "ngram"}, ()),
    ("top_tree", T1, {"branching": "2-2"}, ()),
]


@pytest.mark.parametrize("name,sampling,options,eos", SAMPLED, ids=str)
def test_whole_texts_follow_the_exact_law(name, sampling, options, eos):
    counts = sampled(small(name, sampling, **options), eos)
    assert p_value(counts, laws(sampling, eos)) > 1e-3
