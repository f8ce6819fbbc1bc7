"""Embeddings for a new tokeniser without training: lexical copies, FVT, FOCUS, OFA.

What ZeTT (arXiv 2405.07883, section 4) is compared with. All copy the row of a token that both
vocabularies have, and differ in the others. Tables are [V, c] as in `models.token_tables`: what is
done to input rows is done to output rows.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from models import byte_level
from models.byte_level import ByteLevel
from models.errors import InputError, check_choice

HEURISTICS = ("random", "lexical", "fvt", "focus", "ofa")
_WINDOW = 5  # tokens on each side that count as company


def transfer(
    name: str,
    table: np.ndarray,
    source: ByteLevel,
    target: ByteLevel,
    *,
    texts: Sequence[str] = (),
    rank: int = 64,
    seed: int = 0,
) -> np.ndarray:
    """The target's table by a heuristic of `HEURISTICS`.

    Args:
      name: 'random' draws every row but the special tokens'; 'focus' and 'ofa' need `texts`.
      table: [V_source, c], of the language model.
      source, target: tokenisers, with the same special tokens.
      texts: what auxiliary vectors are counted on.
      rank: columns of auxiliary vectors.
      seed: of random rows.

    Returns:
      float32 [V_target, c]; special tokens have the source's rows.

    Raises:
      InputError: an unknown heuristic, no texts where they are needed, a special token that the
        source does not have.
    """
    check_choice("heuristic", name, HEURISTICS)
    if name in ("focus", "ofa") and not texts:
        raise InputError(f"texts: none given; {name} counts company on a text")
    match = byte_level.overlap(source, target)
    for token, place in target.specials.items():
        if token not in source.specials:
            raise InputError(f"specials: {token!r} is not a special token of the source")
        match[place] = source.specials[token]
    if name == "random":
        found = random_rows(table, target.vocab_size, seed)
    elif name == "lexical":
        found = lexical(table, match, seed)
    elif name == "fvt":
        found = fvt(table, match, [source.decompose(token) for token in target.tokens], seed)
    elif name == "focus":
        auxiliary = company_vectors(map(target.encode, texts), target.vocab_size, rank)
        found = focus(table, match, auxiliary, seed)
    else:
        words = _word_vectors(texts, rank)
        vectors = [_token_vectors(form, words) for form in (source, target)]
        found = ofa(table, match, *vectors, seed=seed)
    places = np.array(list(target.specials.values()), int)
    found[places] = table[match[places]]
    return found.astype(np.float32)


def random_rows(table: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """[count, c], normal with the mean and standard deviation of each of the table's columns."""
    rng = np.random.default_rng(seed)
    return rng.normal(table.mean(0), table.std(0), (count, table.shape[1]))


def lexical(table: np.ndarray, match: np.ndarray, seed: int = 0) -> np.ndarray:
    """Tokens that both have are copied, others drawn.

    Args:
      table: [V_source, c].
      match: int [V_target], the source's id of the same token, or -1.
      seed: of random rows.
    """
    found = random_rows(table, len(match), seed)
    found[match >= 0] = table[match[match >= 0]]
    return found


def fvt(
    table: np.ndarray, match: np.ndarray, pieces: Sequence[Sequence[int]], seed: int = 0
) -> np.ndarray:
    """Fast vocabulary transfer (Gee et al., EMNLP 2022): the mean of what a token decomposes into.

    Args:
      table, match, seed: as `lexical`.
      pieces: by target token, ids of the source; those beyond its table do not count. A token
        of which nothing is left is drawn.
    """
    found = lexical(table, match, seed)
    for place in np.flatnonzero(match < 0).tolist():
        known = [i for i in pieces[place] if i < len(table)]
        if known:
            found[place] = table[known].mean(0)
    return found


def sparsemax(scores: np.ndarray) -> np.ndarray:
    """The Euclidean projection of each row onto the simplex (Martins and Astudillo, 2016).

    Args:
      scores: [n, k].

    Returns:
      [n, k], rows that sum to one, most entries zero.
    """
    ranked = -np.sort(-scores, axis=1)
    above = np.cumsum(ranked, axis=1) - 1
    counts = np.arange(1, scores.shape[1] + 1)
    size = (ranked * counts > above).sum(1, keepdims=True)
    threshold = np.take_along_axis(above, size - 1, axis=1) / size
    return np.maximum(scores - threshold, 0)


def focus(table: np.ndarray, match: np.ndarray, auxiliary: np.ndarray, seed: int = 0) -> np.ndarray:
    """FOCUS (Dobler and de Melo, EMNLP 2023): sparsemax-weighted means of overlapping tokens' rows.

    Weights are the sparsemax of cosine similarities between auxiliary vectors of the target's
    tokens. FOCUS takes these from fastText trained on text in the target's tokens; here they are
    what the caller has (`company_vectors` counts them). A token without one is drawn.

    Args:
      table, match, seed: as `lexical`.
      auxiliary: [V_target, r]; rows of zeros for tokens that were not seen.
    """
    found = lexical(table, match, seed)
    unit = _unit(auxiliary)
    seen = np.linalg.norm(unit, axis=1) > 0
    anchors = np.flatnonzero((match >= 0) & seen)
    new = np.flatnonzero((match < 0) & seen)
    if len(anchors) and len(new):
        weights = sparsemax(unit[new] @ unit[anchors].T)
        found[new] = weights @ table[match[anchors]]
    return found


def ofa(
    table: np.ndarray,
    match: np.ndarray,
    source_vectors: np.ndarray,
    target_vectors: np.ndarray,
    *,
    rank: int | None = None,
    neighbours: int = 10,
    temperature: float = 0.1,
    seed: int = 0,
) -> np.ndarray:
    """OFA (Liu et al., NAACL 2024 findings): the table factorised, coordinates from like tokens.

    The table is U P, by singular values; a new token's coordinates are the mean of its nearest
    source tokens', weighted by the softmax of cosine similarity over `temperature`.

    Args:
      table, match, seed: as `lexical`.
      source_vectors, target_vectors: [V, r], one space of static vectors for both vocabularies;
        zeros for tokens that were not seen.
      rank: of the factorisation; None for all of it.
      neighbours: source tokens that count.
    """
    left, values, right = np.linalg.svd(table, full_matrices=False)
    rank = rank or len(values)
    coordinates, basis = left[:, :rank] * values[:rank], right[:rank]
    chosen = lexical(coordinates, match, seed)
    old, new = _unit(source_vectors), _unit(target_vectors)
    known = np.flatnonzero(np.linalg.norm(old, axis=1) > 0)
    places = np.flatnonzero((match < 0) & (np.linalg.norm(new, axis=1) > 0))
    if len(known) and len(places):
        similarity = new[places] @ old[known].T
        k = min(neighbours, len(known))
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        scores = np.take_along_axis(similarity, nearest, axis=1) / temperature
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        chosen[places] = np.einsum("nk,nkr->nr", weights, coordinates[known[nearest]])
    return chosen @ basis


def company_vectors(
    documents: "Sequence[Sequence[int]] | map[list[int]]", size: int, rank: int = 64
) -> np.ndarray:
    """Static vectors of ids from the company they keep: positive PMI, factorised by an SVD.

    Levy and Goldberg (NeurIPS 2014): what word2vec factorises implicitly. It stands in for
    fastText, which would also read a token's characters.

    Args:
      documents: ids below `size`.
      size: rows.
      rank: columns.

    Returns:
      float64 [size, rank]; zeros for ids that have no company.
    """
    sequences = [np.asarray(document, int) for document in documents]
    counts = scipy.sparse.csr_matrix((size, size))
    for distance in range(1, _WINDOW + 1):
        left = [ids[:-distance] for ids in sequences if len(ids) > distance]
        right = [ids[distance:] for ids in sequences if len(ids) > distance]
        if left:
            a, b = np.concatenate(left), np.concatenate(right)
            counts += scipy.sparse.coo_matrix((np.ones(len(a)), (a, b)), (size, size)).tocsr()
    counts = (counts + counts.T).tocoo()
    each = np.asarray(counts.sum(1)).ravel()
    information = np.log(counts.data * each.sum() / (each[counts.row] * each[counts.col]))
    positive = information > 0
    matrix = scipy.sparse.csr_matrix(
        (information[positive], (counts.row[positive], counts.col[positive])), (size, size)
    )
    vectors = np.zeros((size, rank))
    k = min(rank, size - 1, matrix.nnz)
    if k >= 1:
        start = np.ones(size)  # the same vectors on every run
        left, values, _ = scipy.sparse.linalg.svds(matrix, k, v0=start)
        vectors[:, :k] = (left * np.sqrt(values))[:, ::-1]
    return vectors


def _word_vectors(texts: Sequence[str], rank: int) -> dict[str, np.ndarray]:
    """Vectors of pieces (`byte_level.PIECES`) in byte characters."""
    cut = byte_level.pre_tokenizer()
    documents = [[piece for piece, _ in cut.pre_tokenize_str(text)] for text in texts]
    places = {word: i for i, word in enumerate(dict.fromkeys(itertools.chain(*documents)))}
    ids = [[places[word] for word in words] for words in documents]
    vectors = company_vectors(ids, len(places), rank)
    return {word: vectors[i] for word, i in places.items()}


def _token_vectors(form: ByteLevel, words: Mapping[str, np.ndarray]) -> np.ndarray:
    """A token's vector is the mean of those of the words that it is part of."""
    total = np.zeros((form.vocab_size, len(next(iter(words.values())))))
    count = np.zeros(form.vocab_size)
    for word, vector in words.items():
        ids = np.unique(form.decompose(word))
        total[ids] += vector
        count[ids] += 1
    return total / np.maximum(count, 1)[:, None]


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length one; rows of zeros stay."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
