"""What single subcomponents do, counted in one pass over validation text; report.py puts it on a page.

  A. One pass   examples, counts, histograms: what is kept does not grow with the text
  B. Tables     what the counts say: tokens, co-activity; what U and V say: promoted tokens, norms of heads

Left out: subcomponents that are not live.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor
from tqdm import tqdm

import data
from cluster import coactivation
from eval import Run

CONTEXT = 20  # tokens shown on each side of an example
BINS = 40  # of a histogram
PAIRS_EVERY = 32_768  # tokens after which pairs are counted
TOP = 10  # rows of a table of tokens; co-active subcomponents of a matrix

# ---------------------------------------------------------------------------------------------------------------------
# A. One pass over the text


class Examples:
    """The k examples of highest priority of each of n subcomponents, out of a stream of any length, highest first.

    priority [n, k], -inf where there are fewer; t [n, k]: place in its window; tokens, g, a [n, k, 2 CONTEXT + 1]: around it, 0
    beyond the ends of the window.
    """

    def __init__(self, n: int, k: int) -> None:
        self.priority, self.t = torch.full((n, k), -torch.inf), torch.zeros(n, k, dtype=torch.long)
        self.tokens = torch.zeros(n, k, 2 * CONTEXT + 1, dtype=torch.int32)
        self.g, self.a = torch.zeros(2, n, k, 2 * CONTEXT + 1)

    def offer(self, priority: Tensor, position: Tensor, x: Tensor, g: Tensor, a: Tensor) -> None:
        """Candidates: priority, position [n, m], the latter among the B * T of a batch x [B, T]; g, a [B, T, n]."""
        (n, k), T = self.priority.shape, x.shape[1]
        self.priority, best = torch.cat((self.priority, priority), 1).topk(k, 1)
        rows, old = torch.arange(n)[:, None], best.clamp(max=k - 1)
        self.t, self.tokens, self.g, self.a = (kept[rows, old] for kept in (self.t, self.tokens, self.g, self.a))
        c, slot = ((best >= k) & self.priority.isfinite()).nonzero(as_tuple=True)  # those that are new
        at = position[c, best[c, slot] - k]
        b, t = (at // T)[:, None], at % T
        around = t[:, None] + torch.arange(-CONTEXT, CONTEXT + 1)  # [new, 2 CONTEXT + 1]
        inside, around = (around >= 0) & (around < T), around.clamp(0, T - 1)
        self.t[c, slot] = t
        self.tokens[c, slot] = (x[b, around] * inside).int()
        self.g[c, slot], self.a[c, slot] = g[b, around, c[:, None]] * inside, a[b, around, c[:, None]] * inside


@dataclass
class Harvest:
    """Of n live subcomponents over N validation tokens. A subcomponent *fires* at a position where its g > 0, as in L0.

    live [n]: their columns among all C. fires [n]: positions where it fires; sum_g, sum_a, largest_a [n]: of g and, where it fires,
    of the signed activation a = ||U_c|| V_c^T x, which keeps its sign; the largest |a| is of all positions. histogram_g
    [n, BINS]: positions by g > 0, bins of (0, 1]; histogram_a, histogram_a_fires [n, BINS]: all positions, and those where it fires, by
    a, between `a_range` [n, 2] (beyond an end: in the last bin). together [n, n]: positions where both fire. input, predicted [n, vocab]:
    positions where it fires by their token, and by the most probable next token of f(x | W); *_total [vocab]: all positions.
    rms_inverse: mean of 1 / RMS of the residual stream before the unembedding. top: its examples by g |a|, one a window; random: drawn
    evenly from the positions where it fires.
    """

    live: np.ndarray
    N: int
    fires: np.ndarray
    sum_g: np.ndarray
    sum_a: np.ndarray
    largest_a: np.ndarray
    histogram_g: np.ndarray
    histogram_a: np.ndarray
    histogram_a_fires: np.ndarray
    a_range: np.ndarray
    together: np.ndarray
    input: sp.csr_matrix
    predicted: sp.csr_matrix
    input_total: np.ndarray
    predicted_total: np.ndarray
    rms_inverse: float
    top: Examples
    random: Examples


def blocks(corpus: data.Corpus, T: int, n_tokens: int, batch: int, seed: int) -> Iterator[Tensor]:
    """n_tokens or a few more of the validation text in windows of T that do not overlap, in random order: [<= batch, T].

    ValueError if there is not one whole window.
    """
    tokens = corpus.tokens["val"]
    order = np.random.default_rng(seed).permutation(len(tokens) // T)[: -(-n_tokens // T)]
    if not len(order):
        raise ValueError(f"{corpus.name}: its validation text has {len(tokens)} tokens, a window needs {T}")
    for i in range(0, len(order), batch):
        yield torch.from_numpy(tokens[order[i : i + batch, None] * T + np.arange(T)].astype(np.int64))


def activations(run: Run, inputs: list[Tensor], columns: list[np.ndarray]) -> Tensor:
    """Signed activations a = ||U_c|| V_c^T x, [B, T, n], of columns[l] of every matrix; inputs: L x [B, T, d_in]."""
    D = run.decomposition
    return torch.cat(
        [x @ (D.V[name][:, c] * D.U[name][:, c].norm(dim=0)).detach() for name, x, c in zip(D.names, inputs, columns)],
        -1,
    )


def columns_of(live: np.ndarray, C: dict[str, int]) -> list[np.ndarray]:
    """Columns among all C, ascending [n], as numbers within each matrix."""
    first = np.cumsum([0, *C.values()])
    return [live[(live >= a) & (live < b)] - a for a, b in zip(first, first[1:])]


def count_bins(bin: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
    """How many of bin [P, n], numbers below BINS, fall in each; int64 [n, BINS]; where: bool [P, n], those that count."""
    n = bin.shape[1]
    flat = bin + BINS * np.arange(n)
    return np.bincount((flat if where is None else flat[where]).ravel(), minlength=BINS * n).reshape(n, BINS)


def one_hot(tokens: np.ndarray, vocab: int) -> sp.csr_matrix:
    """int32 [P, vocab]."""
    return sp.csr_matrix(
        (np.ones(len(tokens), np.int32), tokens, np.arange(len(tokens) + 1)), shape=(len(tokens), vocab)
    )


def count(g: np.ndarray, a: np.ndarray, fires: np.ndarray, a_range: np.ndarray) -> dict[str, np.ndarray]:
    """What a Harvest adds up of each subcomponent by itself, of one batch; g, a, fires [P, n]."""
    scale = (BINS / (a_range[:, 1] - a_range[:, 0])).astype(np.float32)
    bin_a = ((a - a_range[:, 0]) * scale).clip(0, BINS - 1).astype(np.int64)
    return {
        "fires": fires.sum(0), "sum_g": g.sum(0, dtype=np.float64), "sum_a": (a * fires).sum(0, dtype=np.float64),
        "histogram_g": count_bins((np.ceil(g * BINS) - 1).clip(0).astype(np.int64), fires),
        "histogram_a": count_bins(bin_a), "histogram_a_fires": count_bins(bin_a, fires),
    }  # fmt: skip


def count_pairs(pending: list[tuple[sp.csr_matrix, np.ndarray, np.ndarray]], vocab: int) -> dict:
    """And of pairs, of several batches at once, as this costs n^2 each time: (fires [P, n], tokens [P], predicted [P]) of each."""
    fires, tokens, predicted = zip(*pending)
    fires, tokens, predicted = sp.vstack(fires, format="csr"), np.concatenate(tokens), np.concatenate(predicted)
    return {
        "together": coactivation(fires), "input": (fires.T @ one_hot(tokens, vocab)).tocsr(), "predicted": (fires.T @ one_hot(predicted, vocab)).tocsr(),
        "input_total": np.bincount(tokens, minlength=vocab), "predicted_total": np.bincount(predicted, minlength=vocab),
    }  # fmt: skip


def add(total: dict, new: dict) -> None:
    for name, value in new.items():
        total[name] = total[name] + value if name in total else value


@torch.no_grad()
def harvest(run: Run, corpus: data.Corpus, live: np.ndarray, n_tokens: int, k: int, seed: int) -> Harvest:
    """One pass over the text with k top and k random examples of each subcomponent. Memory: n^2, n * vocab and n * k, whatever N is."""
    T, n, vocab = run.config["T"], len(live), corpus.vocab_size
    device = next(run.ci_fn.parameters()).device
    batch = max(1, min(64, 2**24 // (n * T)))  # windows: g and a are [batch * T, n]
    columns, generator = columns_of(live, run.decomposition.C), torch.Generator().manual_seed(seed)
    of_live = torch.from_numpy(live).to(device)
    N, rms_inverse, a_range, largest_a = 0, 0.0, None, np.zeros(n)
    h, pending = {}, []  # counts so far; what count_pairs has not seen yet
    top, random = Examples(n, k), Examples(n, k)

    def see_residual(block, args, y: Tensor) -> None:
        nonlocal rms_inverse
        rms_inverse += y.pow(2).mean(-1).rsqrt().sum().item()

    hook = run.decomposition.target.blocks[-1].register_forward_hook(see_residual)
    bar = tqdm(
        total=min(-(-n_tokens // T), len(corpus.tokens["val"]) // T) * T,
        desc="harvest",
        unit=" tokens",
        unit_scale=True,
        mininterval=1,
        leave=False,
    )
    try:
        for x in blocks(corpus, T, n_tokens, batch, seed):
            output, g, inputs = run.importances_and_inputs(x.to(device))
            g, a = g[..., of_live].float().cpu(), activations(run, inputs, columns).float().cpu()
            fires, score = (
                g.flatten(0, 1) > 0,
                (g * a.abs()).masked_fill(g == 0, -torch.inf),
            )  # [P, n], [B, T, n] with P = B T
            priority, t = score.max(1)  # [B, n]
            top.offer(priority.T, t.T + T * torch.arange(len(x)), x, g, a)
            keys = torch.rand(fires.shape, generator=generator).masked_fill(
                ~fires, -torch.inf
            )  # the k largest of even keys are an even draw
            random.offer(*(part.T for part in keys.topk(min(k, len(keys)), 0)), x, g, a)

            flat_g, flat_a, fires = g.flatten(0, 1).numpy(), a.flatten(0, 1).numpy(), fires.numpy()
            if a_range is None:
                low, high = np.minimum(flat_a.min(0), 0), np.maximum(flat_a.max(0), 0)
                a_range = np.stack((1.1 * low - 0.1 * high - 1e-9, 1.1 * high - 0.1 * low + 1e-9), 1)
            add(h, count(flat_g, flat_a, fires, a_range))
            largest_a = np.maximum(largest_a, np.abs(flat_a).max(0))
            pending.append(
                (sp.csr_matrix(fires, dtype=np.int32), x.numpy().ravel(), output.argmax(-1).cpu().numpy().ravel())
            )
            if sum(len(tokens) for _, tokens, _ in pending) >= PAIRS_EVERY:
                add(h, count_pairs(pending, vocab))
                pending = []
            N += x.numel()
            bar.update(x.numel())
        if pending:
            add(h, count_pairs(pending, vocab))
    finally:
        hook.remove()
        bar.close()
    return Harvest(
        live=live, N=N, a_range=a_range, largest_a=largest_a, rms_inverse=rms_inverse / N, top=top, random=random, **h
    )


# ---------------------------------------------------------------------------------------------------------------------
# B. Tables


def token_table(counts: sp.csr_matrix, fires: np.ndarray, total: np.ndarray, N: int, by: str) -> dict[str, np.ndarray]:
    """The TOP tokens of each subcomponent, by `recall` or by `pmi`, best first: {token, count, recall, pmi}, [n, TOP] each.

    recall: P(token | fires), the share of the positions where it fires that have this token, in [0, 1]; pmi:
    log2 P(token, fires) / (P(token) P(fires)), bits. By pmi only tokens with at least 5 such positions count, or a tenth of all
    positions where it fires if that is fewer: one chance meeting is no evidence. count is 0 where there are no more.
    """
    found = {"token": np.int64, "count": np.int64, "recall": np.float64, "pmi": np.float64}
    found = {name: np.zeros((len(fires), TOP), dtype) for name, dtype in found.items()}
    for c in range(len(fires)):
        tokens, count = (
            counts.indices[counts.indptr[c] : counts.indptr[c + 1]],
            counts.data[counts.indptr[c] : counts.indptr[c + 1]],
        )
        if by == "pmi":
            enough = count >= min(5, fires[c] / 10)
            tokens, count = tokens[enough], count[enough]
        recall, pmi = count / fires[c], np.log2(count * N / (fires[c] * total[tokens]))
        order = np.lexsort((tokens, -count, -pmi) if by == "pmi" else (tokens, -count))[:TOP]
        for name, values in zip(found, (tokens, count, recall, pmi)):
            found[name][c, : len(order)] = values[order]
    return found


def coactive(together: np.ndarray, fires: np.ndarray, matrix: np.ndarray, L: int) -> tuple[np.ndarray, np.ndarray]:
    """The TOP most co-active subcomponents in each of L matrices: places [n, L, TOP], -1 where there are no more, and overlaps.

    overlap: positions where both fire / positions where either does, in [0, 1]. matrix [n]: the matrix of each.
    """
    n = len(fires)
    place, overlap = np.full((n, L, TOP), -1), np.zeros((n, L, TOP))
    for l in range(L):
        inside = np.flatnonzero(matrix == l)
        for a in range(0, n if len(inside) else 0, 1024):  # in blocks, so that no second n^2 array is made
            rows = np.arange(a, min(a + 1024, n))
            both = together[np.ix_(rows, inside)]
            share = both / np.maximum(1, fires[rows, None] + fires[inside] - both)
            share[rows[:, None] == inside] = 0  # itself
            order = np.argsort(-share, 1, kind="stable")[:, :TOP]
            best = np.take_along_axis(share, order, 1)
            place[rows, l, : order.shape[1]], overlap[rows, l, : order.shape[1]] = (
                np.where(best > 0, inside[order], -1),
                best,
            )
    return place, overlap


def promoted(
    run: Run, columns: list[np.ndarray], mean_a: np.ndarray, rms_inverse: float
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that the write vectors of `o` and `down` promote, then suppress: token, logits [n, 2, TOP]; 0 for other matrices.

    Logits that the subcomponent adds to a token at its mean activation where it fires, straight through the tied unembedding E:
        mean_a * E U_c / ||U_c|| / RMS(residual stream), less the mean over the vocabulary, which no softmax sees.
    The normalisation before E has no weights and is taken as fixed; later blocks are left out.
    """
    E, D, start = run.decomposition.target.unembedding, run.decomposition, 0
    token, logits = np.zeros((len(mean_a), 2, TOP), np.int64), np.zeros((len(mean_a), 2, TOP))
    for name, numbers in zip(D.names, columns):
        if name.endswith((".o", ".down")) and len(numbers):
            here = slice(start, start + len(numbers))
            U = D.U[name][:, numbers]
            effect = (
                (E @ (U / U.norm(dim=0))).detach().double().cpu().numpy() * mean_a[here] * rms_inverse
            )  # [vocab, columns]
            effect = (effect - effect.mean(0)).T
            order = np.argsort(-effect, 1, kind="stable")
            both = np.stack((order[:, :TOP], order[:, ::-1][:, :TOP]), 1)
            token[here, :, : both.shape[2]] = both
            logits[here, :, : both.shape[2]] = np.take_along_axis(effect[:, None], both, 2)
        start += len(numbers)
    return token, logits


def norms(run: Run, columns: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """||U_c V_c^T|| = ||U_c|| ||V_c||, [n], and the part of it that each head has, [n, heads]: its rows of U for q, k and v, its
    rows of V for o, so that the squares add up to the whole; 0 for the MLP."""
    D, heads = run.decomposition, run.decomposition.target.config.n_head
    whole, per_head = [], []
    for name, numbers in zip(D.names, columns):
        U, V = (x[name][:, numbers].detach().cpu() for x in (D.U, D.V))
        whole.append(U.norm(dim=0) * V.norm(dim=0))
        split, other = (V, U) if name.endswith(".o") else (U, V)
        part = split.unflatten(0, (heads, -1)).norm(dim=1) * other.norm(dim=0)  # [heads, columns]
        per_head.append(part.T if ".attn." in name else torch.zeros_like(part.T))
    return torch.cat(whole).numpy(), torch.cat(per_head).numpy()
