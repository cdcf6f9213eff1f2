"""What single subcomponents do, counted in one pass over validation text: the counting half of studies/report.py.

  A. Which      those that are live, and their names
  B. One pass   examples, counts, histograms: they do not grow with the text
  C. Tables     what the counts say: tokens, co-activity; what U and V say: promoted tokens, norms of heads

Left out: subcomponents that are not live.
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor
from tqdm import tqdm

import data
import eval as evaluation
from cluster import coactivation
from eval import ALIVE, Run, mean_importances
from flags import UserError

CONTEXT = 20  # tokens shown on each side of an example
BINS = 40  # of a histogram
AT_A_TIME = 2**24  # numbers of g, of a, or of logits, that are looked at together on the CPU
PAIRS_EVERY = 32_768  # tokens after which pairs are counted
TOP = 10  # rows of a table of tokens; co-active subcomponents of a matrix

# ---------------------------------------------------------------------------------------------------------------------
# A. Which


def evaluated_importances(run: Run, corpus: data.Corpus) -> tuple[Tensor, ...]:
    """mean_importances on eval.py's windows, [C] each, some windows at a time."""
    n, T = run.config["eval_windows"], run.config["T"]
    parts = run.batches(evaluation.validation_windows(corpus, n, T, evaluation.Config.seed))
    means = zip(*(mean_importances([run.importances(x[:, :-1])[1]]) for x in parts))
    return tuple((sum(len(x) * part.double() for x, part in zip(parts, of)) / n).float() for of in means)


def live_columns(run: Run, mean_g: Tensor) -> np.ndarray:
    """The live subcomponents among all C, by the mean g of `evaluated_importances`. UserError if there is none."""
    live = np.flatnonzero(mean_g > ALIVE)
    if not len(live):
        seen = f"{run.config['eval_windows'] * run.config['T']:,} validation tokens"
        why = f"none of {len(mean_g):,} has a mean g above {ALIVE:g} over {seen}"
        raise UserError(f"{run.folder}: no live subcomponent: {why}; train longer, or with a smaller beta_imp")
    return live


def short(name: str) -> str:
    """ "blocks.1.mlp.up" to "1.mlp.up", as in the page's links."""
    return name.removeprefix("blocks.")


def names_of(run: Run, columns: np.ndarray) -> list[str]:
    """Names of the columns among all C, as in the page's links: "1.mlp.up:23"."""
    columns = columns_of(columns, run.decomposition.C)
    return [f"{short(name)}:{c}" for name, numbers in zip(run.decomposition.names, columns) for c in numbers]


def columns_of(live: np.ndarray, C: dict[str, int]) -> list[np.ndarray]:
    """Columns among all C, ascending [n], as numbers within each matrix."""
    first = np.cumsum([0, *C.values()])
    return [live[(live >= a) & (live < b)] - a for a, b in zip(first, first[1:])]


# ---------------------------------------------------------------------------------------------------------------------
# B. One pass over the text


class Examples:
    """The k examples of highest priority of each of n subcomponents, out of a stream of any length, highest first.

    priority [n, k], -inf where there are fewer; t [n, k]: place in its window.
    tokens, g, a [n, k, 2 CONTEXT + 1]: around it, 0 beyond the ends of the window.
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

    Its activation a = ||U_c|| V_c^T x keeps its sign.
    """

    live: np.ndarray  # [n]: columns among all C
    N: int
    fires: np.ndarray  # [n]: positions where it fires
    sum_g: np.ndarray  # [n]
    sum_a: np.ndarray  # [n]: where it fires
    largest_a: np.ndarray  # [n]: the largest |a| of all positions
    a_range: np.ndarray  # [n, 2]: what the bins of a divide; what lies beyond an end is in the last bin
    histogram_g: np.ndarray  # [n, BINS]: positions where it fires, by g in (0, 1]
    histogram_a: np.ndarray  # [n, BINS]: all positions, by a
    histogram_a_fires: np.ndarray  # [n, BINS]: positions where it fires, by a
    together: np.ndarray  # [n, n]: positions where both fire
    input: sp.csr_matrix  # [n, vocab]: positions where it fires, by their token
    predicted: sp.csr_matrix  # [n, vocab]: and by the most probable next token of f(x | W)
    input_total: np.ndarray  # [vocab]: all positions, by their token
    predicted_total: np.ndarray  # [vocab]
    rms_inverse: float  # mean of 1 / RMS of the residual stream before the unembedding
    top: Examples  # by g |a|, one a window
    random: Examples  # drawn evenly from the positions where it fires


def window_starts(corpus: data.Corpus, T: int, n_tokens: int, seed: int) -> np.ndarray:
    """Where the windows of `random_windows` begin in the validation text, [N / T], in random order."""
    return T * np.random.default_rng(seed).permutation(len(corpus.tokens["val"]) // T)[: -(-n_tokens // T)]


def random_windows(corpus: data.Corpus, T: int, n_tokens: int, seed: int) -> Tensor:
    """n_tokens or a few more of the validation text, at most all of it: windows [N / T, T] that do not overlap."""
    starts = window_starts(corpus, T, n_tokens, seed)
    return torch.from_numpy(corpus.tokens["val"][starts[:, None] + np.arange(T)].astype(np.int64))


def activations(run: Run, inputs: list[Tensor], columns: list[np.ndarray]) -> Tensor:
    """Signed activations a = ||U_c|| V_c^T x, [B, T, n], of columns[l] of every matrix; inputs: L x [B, T, d_in]."""
    U, V, names = run.decomposition.U, run.decomposition.V, run.decomposition.names
    parts = [x @ (V[name][:, c] * U[name][:, c].norm(dim=0)).detach() for name, x, c in zip(names, inputs, columns)]
    return torch.cat(parts, -1)


def count(g: np.ndarray, a: np.ndarray, fires: np.ndarray, a_range: np.ndarray) -> dict[str, np.ndarray]:
    """What a Harvest adds up of each subcomponent by itself, of one batch; g, a, fires [P, n]."""
    n, owner = g.shape[1], fires.nonzero()[1]  # of each time that one fires: which
    scale = (BINS / (a_range[:, 1] - a_range[:, 0])).astype(np.float32)
    bin_a = ((a - a_range[:, 0]) * scale).clip(0, BINS - 1).astype(np.int64) + BINS * np.arange(n)  # [P, n]
    bin_g = (np.ceil(g[fires] * BINS) - 1).astype(np.int64) + BINS * owner
    bins = {"histogram_g": bin_g, "histogram_a": bin_a.ravel(), "histogram_a_fires": bin_a[fires]}
    return {name: np.bincount(at, minlength=BINS * n).reshape(n, BINS) for name, at in bins.items()} | {
        "fires": np.bincount(owner, minlength=n),
        "sum_g": np.bincount(owner, g[fires], n),
        "sum_a": np.bincount(owner, a[fires], n),
    }


def one_hot(tokens: np.ndarray, vocab: int) -> sp.csr_matrix:
    """int32 [P, vocab]."""
    ones, ends = np.ones(len(tokens), np.int32), np.arange(len(tokens) + 1)
    return sp.csr_matrix((ones, tokens, ends), shape=(len(tokens), vocab))


def count_pairs(pending: list[tuple[sp.csr_matrix, np.ndarray, np.ndarray]], vocab: int) -> dict:
    """And of pairs, of several batches, (fires [P, n], tokens [P], predicted [P]) each: at once, as it costs n^2."""
    fires, tokens, predicted = zip(*pending)
    fires, tokens, predicted = sp.vstack(fires, format="csr"), np.concatenate(tokens), np.concatenate(predicted)
    return {
        "together": coactivation(fires),
        "input": (fires.T @ one_hot(tokens, vocab)).tocsr(),
        "predicted": (fires.T @ one_hot(predicted, vocab)).tocsr(),
        "input_total": np.bincount(tokens, minlength=vocab),
        "predicted_total": np.bincount(predicted, minlength=vocab),
    }


def add(total: dict, new: dict) -> None:
    for name, value in new.items():
        if name in total:
            total[name] += value
        else:
            total[name] = value


def harvest(run: Run, corpus: data.Corpus, live: np.ndarray, n_tokens: int, k: int, seed: int) -> Harvest:
    """One pass over the text; k top and k random examples of each subcomponent. Memory: n^2, n * vocab and n * k."""
    T, n, vocab = run.config["T"], len(live), corpus.vocab_size
    columns, generator = columns_of(live, run.decomposition.C), torch.Generator().manual_seed(seed)
    windows, of_live = random_windows(corpus, T, n_tokens, seed), torch.from_numpy(live).to(run.device)
    at_a_time = min(64, max(1, AT_A_TIME // (n * T)))
    batches = [x for part in run.batches(windows) for x in part.split(at_a_time)]
    N, rms_inverse, a_range, largest_a = windows.numel(), 0.0, None, np.zeros(n)
    h, pending = {}, []  # counts so far; what count_pairs has not seen yet
    top, random = Examples(n, k), Examples(n, k)

    def see_residual(block, args, y: Tensor) -> None:
        nonlocal rms_inverse
        rms_inverse += centred(run, y).pow(2).mean(-1).rsqrt().sum().item() / N

    bar = tqdm(total=N, desc="harvest", unit=" tokens", unit_scale=True, mininterval=1, leave=False)
    with run.decomposition.target.blocks[-1].register_forward_hook(see_residual), bar:
        for x in batches:
            hidden, g, inputs = run.importances(x)
            predicted = torch.cat([run.logits(part).argmax(-1) for part in hidden.flatten(0, 1).split(2048)])
            x, g, a = x.cpu(), g[..., of_live].cpu(), activations(run, inputs, columns).cpu()  # [B, T, n]
            fires, score = g > 0, (g * a.abs()).masked_fill(g == 0, -torch.inf)
            priority, t = score.max(1)  # [B, n]
            top.offer(priority.T, t.T + T * torch.arange(len(x)), x, g, a)
            fires = fires.flatten(0, 1)  # [P, n] with P = B T
            keys = torch.rand(fires.shape, generator=generator).masked_fill(~fires, -torch.inf)
            # The highest of keys that are drawn evenly are an even draw.
            random.offer(*(part.T for part in keys.topk(min(k, len(keys)), 0)), x, g, a)

            flat_g, flat_a, fires = g.flatten(0, 1).numpy(), a.flatten(0, 1).numpy(), fires.numpy()
            if a_range is None:
                low, high = np.minimum(flat_a.min(0), 0), np.maximum(flat_a.max(0), 0)
                a_range = np.stack((1.1 * low - 0.1 * high - 1e-9, 1.1 * high - 0.1 * low + 1e-9), 1)
            add(h, count(flat_g, flat_a, fires, a_range))
            largest_a = np.maximum(largest_a, np.abs(flat_a).max(0))
            pending.append((sp.csr_matrix(fires, dtype=np.int32), x.numpy().ravel(), predicted.cpu().numpy()))
            if x is batches[-1] or sum(len(tokens) for _, tokens, _ in pending) >= PAIRS_EVERY:
                add(h, count_pairs(pending, vocab))
                pending = []
            bar.update(x.numel())
    return Harvest(live, N, a_range=a_range, largest_a=largest_a, rms_inverse=rms_inverse, top=top, random=random, **h)


# ---------------------------------------------------------------------------------------------------------------------
# C. Tables


def token_table(counts: sp.csr_matrix, fires: np.ndarray, total: np.ndarray, N: int, by: str) -> dict[str, np.ndarray]:
    """The TOP tokens of each subcomponent by `recall` or `pmi`, best first: {token, count, recall, pmi}, [n, TOP] each.

    recall: P(token | fires), the share of the positions where it fires that have this token, in [0, 1].
    pmi: log2 P(token, fires) / (P(token) P(fires)), bits. By it only tokens of at least 5 such positions count, or of a
    tenth of all where it fires if that is fewer: one chance meeting is no evidence. count is 0 where there is none.
    """
    found = {name: np.zeros((len(fires), TOP), kind) for name, kind in (("token", int), ("count", int))}
    found |= {name: np.zeros((len(fires), TOP)) for name in ("recall", "pmi")}
    for c, (first, end) in enumerate(zip(counts.indptr, counts.indptr[1:])):
        tokens, count = counts.indices[first:end], counts.data[first:end]
        if by == "pmi":
            enough = count >= min(5, fires[c] / 10)
            tokens, count = tokens[enough], count[enough]
        recall, pmi = count / fires[c], np.log2(count * N / (fires[c] * total[tokens]))
        order = np.lexsort((tokens, -count, -pmi) if by == "pmi" else (tokens, -count))[:TOP]
        for name, values in zip(found, (tokens, count, recall, pmi)):
            found[name][c, : len(order)] = values[order]
    return found


def coactive(together: np.ndarray, fires: np.ndarray, matrix: np.ndarray, L: int) -> tuple[np.ndarray, np.ndarray]:
    """The TOP most co-active subcomponents in each of L matrices, of overlap above 0: places and overlaps, [n, L, TOP].

    overlap: positions where both fire / positions where either does, in [0, 1]. place: -1 where there are no more.
    matrix [n]: the matrix of each.
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
            place[rows, l, : order.shape[1]] = np.where(best > 0, inside[order], -1)
            overlap[rows, l, : order.shape[1]] = best
    return place, overlap


def centred(run: Run, y: Tensor) -> Tensor:
    """The residual stream, or a write to it, [..., d_model], as the normalisation before the unembedding takes it."""
    norm = getattr(run.decomposition.target, "final_norm", None)
    return y - y.mean(-1, keepdim=True) if isinstance(norm, torch.nn.LayerNorm) else y


@torch.no_grad()
def norm_weights(run: Run) -> Tensor | None:
    """And the weights it multiplies with, [d_model, 1]; None of a target of ours, which has none.

    Found by trying, as some libraries write w and some 1 + w: signs with mean 0 and RMS 1 come out as their weights.
    """
    if (norm := getattr(run.decomposition.target, "final_norm", None)) is None:
        return None
    signs = torch.ones(run.unembedding.shape[1], device=run.device)
    signs[1::2] = -1
    return (signs * (norm(signs) - norm(-signs)) / 2)[:, None]


def promoted(run: Run, columns: list[np.ndarray], mean_a: np.ndarray, rms_inverse: float) -> tuple[np.ndarray, ...]:
    """Tokens that the write vectors of `o` and `down` promote, then suppress: token, logits [n, 2, TOP]; else 0.

    Logits that one adds to a token at its mean activation where it fires, straight through the unembedding E:
        mean_a * E U_c / ||U_c|| / RMS(residual stream), less the mean over the vocabulary, which no softmax sees.
    The normalisation before E is taken as fixed: of ours it has no weights, of another model they scale U_c, and a
    LayerNorm centres it. Later blocks, and a soft cap, are left out.
    """
    n, start, at_a_time = min(TOP, len(run.unembedding)), 0, max(1, AT_A_TIME // len(run.unembedding))
    token, logits = np.zeros((len(mean_a), 2, TOP), int), np.zeros((len(mean_a), 2, TOP))
    weights = norm_weights(run)
    for name, numbers in zip(run.decomposition.names, columns):
        writes = name.endswith((".o", ".down"))
        for part in np.split(numbers, range(at_a_time, len(numbers), at_a_time)):
            here, start = slice(start, start + len(part)), start + len(part)
            if writes and len(part):
                U = run.decomposition.U[name][:, part].detach()
                U = weights * centred(run, (U / U.norm(dim=0)).T).T if weights is not None else U / U.norm(dim=0)
                effect = (run.unembedding @ U).double().cpu()  # [vocab, part]
                effect = (effect - effect.mean(0)) * torch.from_numpy(mean_a[here] * rms_inverse)
                for side in (0, 1):
                    best = effect.topk(n, 0, largest=side == 0)
                    token[here, side, :n], logits[here, side, :n] = best.indices.T, best.values.T
    return token, logits


def head_width(run: Run) -> int:
    config = run.decomposition.target.config
    return getattr(config, "d_head", None) or config.d_model // config.n_head


def norms(run: Run, columns: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """||U_c V_c^T|| = ||U_c|| ||V_c||, [n], and the part of it that each head has, [n, heads].

    A head's part is its rows of U for q, k and v, its rows of V for o: the squares add up to the whole's. 0 for MLPs,
    and for the heads that k and v lack where several heads share theirs.
    """
    heads, d_head, whole, per_head = run.decomposition.target.config.n_head, head_width(run), [], []
    for name, numbers in zip(run.decomposition.names, columns):
        U, V = (x[name][:, numbers].detach().cpu() for x in (run.decomposition.U, run.decomposition.V))
        whole.append(U.norm(dim=0) * V.norm(dim=0))
        split, other = (V, U) if name.endswith(".o") else (U, V)
        by_head = torch.zeros(heads, U.shape[1])  # [heads, columns]
        if ".attn." in name and len(split) % d_head == 0 and len(split) <= heads * d_head:
            by_head[: len(split) // d_head] = split.unflatten(0, (-1, d_head)).norm(dim=1) * other.norm(dim=0)
        per_head.append(by_head.T)
    return torch.cat(whole).numpy(), torch.cat(per_head).numpy()
