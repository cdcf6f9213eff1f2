"""Look at single subcomponents: one self-contained page, report.html, and labels.jsonl for whoever names them.

    python interpret.py out/vpd-stdlib                                  # decompose.py does it at its end
    python interpret.py out/vpd-stdlib --prompt='for i in range(' --prompt='x = ('
    python interpret.py out/vpd-stdlib --labels=named.jsonl             # labels.jsonl with its labels filled in, shown on the page

The page opens by double click, works offline and asks nothing of any network. It shows the live subcomponents of eval.py (mean g
above ALIVE on its windows); everything else about them is counted over other validation text, as a stream.

  A. Harvest     one pass over the text; what it keeps does not grow with it
  B. Tables      what the counts say: tokens, co-activity; what U and V say: promoted tokens, heads
  C. Prompts     what is important where, and what the model predicts under four masks
  D. Labels
  E. The page    everything into interpret.html, the template
  F. The run

Left out: labelling by a language model; subcomponents that are not live.
"""

import base64
import gzip
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor
from tqdm import tqdm

import data
from cluster import coactivation, open_run
from components import read_clusters
from eval import ALIVE, PGD_STEPS, Run, adversarial_sources, layer_of, masks, mean_importances, read_metrics
from eval import Config as Evaluation
from losses import mask
from train_target import read_log, run_script, written

CONTEXT = 20  # tokens shown on each side of an example
BINS = 40  # of a histogram
TOP = 10  # rows of a table of tokens; co-active subcomponents of a matrix
MOST_EXAMPLES = 120_000  # in a report, of all subcomponents together: what keeps it under 30 MB
PROMPT_TOKENS = 64  # of a prompt taken from the validation text
MODES = ("target", "rounded", "stochastic", "adversarial")  # of the prompts
OUT_OF = 255  # g in the page, in steps of 1/255

# ---------------------------------------------------------------------------------------------------------------------
# A. Harvest


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


def blocks(corpus: data.Corpus, T: int, n_tokens: int, batch: int, seed: int):
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
    return torch.cat([x @ (D.V[name][:, c] * D.U[name][:, c].norm(dim=0)).detach() for name, x, c in zip(D.names, inputs, columns)], -1)


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
    return sp.csr_matrix((np.ones(len(tokens), np.int32), tokens, np.arange(len(tokens) + 1)), shape=(len(tokens), vocab))


@torch.no_grad()
def harvest(run: Run, corpus: data.Corpus, live: np.ndarray, n_tokens: int, k: int, seed: int) -> Harvest:
    """One pass over the text with k top and k random examples of each subcomponent. Memory: n^2, n * vocab and n * k, whatever N is."""
    T, n, vocab = run.config["T"], len(live), corpus.vocab_size
    device = next(run.ci_fn.parameters()).device
    batch = max(1, min(64, 2**24 // (n * T)))  # windows: g and a are [batch * T, n]
    columns, generator = columns_of(live, run.decomposition.C), torch.Generator().manual_seed(seed)
    of_live = torch.from_numpy(live).to(device)
    N, rms_inverse, h = 0, 0.0, None
    top, random = Examples(n, k), Examples(n, k)

    def see_residual(block, args, y: Tensor) -> None:
        nonlocal rms_inverse
        rms_inverse += y.pow(2).mean(-1).rsqrt().sum().item()

    hook = run.decomposition.target.blocks[-1].register_forward_hook(see_residual)
    bar = tqdm(total=min(-(-n_tokens // T), len(corpus.tokens["val"]) // T) * T, desc="harvest", unit=" tokens", unit_scale=True, mininterval=1, leave=False)
    try:
        for x in blocks(corpus, T, n_tokens, batch, seed):
            output, g, inputs = run.importances_and_inputs(x.to(device))
            g, a = g[..., of_live].float().cpu(), activations(run, inputs, columns).float().cpu()
            fires, score = g.flatten(0, 1) > 0, (g * a.abs()).masked_fill(g == 0, -torch.inf)  # [P, n], [B, T, n] with P = B T
            priority, t = score.max(1)  # [B, n]
            top.offer(priority.T, t.T + T * torch.arange(len(x)), x, g, a)
            keys = torch.rand(fires.shape, generator=generator).masked_fill(~fires, -torch.inf)  # the k largest of even keys are an even draw
            random.offer(*(part.T for part in keys.topk(min(k, len(keys)), 0)), x, g, a)

            F, x, guess = sp.csr_matrix(fires.numpy(), dtype=np.int32), x.numpy().ravel(), output.argmax(-1).cpu().numpy().ravel()
            flat_g, flat_a, fires = g.flatten(0, 1).numpy(), a.flatten(0, 1).numpy(), fires.numpy()
            if h is None:
                low, high = np.minimum(flat_a.min(0), 0), np.maximum(flat_a.max(0), 0)
                a_range = np.stack((low, high), 1) + 0.1 * (high - low + 1e-9)[:, None] * np.array([-1, 1])
            bin_a = ((flat_a - a_range[:, 0]) / (a_range[:, 1] - a_range[:, 0]) * BINS).clip(0, BINS - 1).astype(np.int64)
            new = {
                "fires": fires.sum(0), "sum_g": flat_g.sum(0, dtype=np.float64), "sum_a": (flat_a * fires).sum(0, dtype=np.float64),
                "histogram_g": count_bins((np.ceil(flat_g * BINS) - 1).clip(0).astype(np.int64), fires),
                "histogram_a": count_bins(bin_a), "histogram_a_fires": count_bins(bin_a, fires), "together": coactivation(F),
                "input": (F.T @ one_hot(x, vocab)).tocsr(), "predicted": (F.T @ one_hot(guess, vocab)).tocsr(),
                "input_total": np.bincount(x, minlength=vocab), "predicted_total": np.bincount(guess, minlength=vocab),
            }  # fmt: skip
            largest_a = np.abs(flat_a).max(0) if h is None else np.maximum(largest_a, np.abs(flat_a).max(0))
            h = new if h is None else {name: h[name] + value for name, value in new.items()}
            N += len(x)
            bar.update(len(x))
    finally:
        hook.remove()
        bar.close()
    return Harvest(live=live, N=N, a_range=a_range, largest_a=largest_a, rms_inverse=rms_inverse / N, top=top, random=random, **h)


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
        tokens, count = counts.indices[counts.indptr[c] : counts.indptr[c + 1]], counts.data[counts.indptr[c] : counts.indptr[c + 1]]
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
            place[rows, l, : order.shape[1]], overlap[rows, l, : order.shape[1]] = np.where(best > 0, inside[order], -1), best
    return place, overlap


def promoted(run: Run, columns: list[np.ndarray], mean_a: np.ndarray, rms_inverse: float) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that the write vectors of `o` and `down` promote, then suppress: token, logits [n, 2, TOP]; 0 for other matrices.

    Logits that the subcomponent adds to a token at its mean activation where it fires, straight through the tied unembedding E:
        mean_a * E U_c / ||U_c|| / RMS(residual stream), less the mean over the vocabulary, which no softmax sees.
    The normalisation before E has no weights and is taken as fixed; later blocks are left out.
    """
    E, D, start = run.decomposition.target.embed.weight, run.decomposition, 0
    token, logits = np.zeros((len(mean_a), 2, TOP), np.int64), np.zeros((len(mean_a), 2, TOP))
    for name, numbers in zip(D.names, columns):
        if name.endswith((".o", ".down")) and len(numbers):
            here = slice(start, start + len(numbers))
            U = D.U[name][:, numbers]
            effect = (E @ (U / U.norm(dim=0))).detach().double().cpu().numpy() * mean_a[here] * rms_inverse  # [vocab, columns]
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


# ---------------------------------------------------------------------------------------------------------------------
# C. Prompts


def read_prompts(run: Run, corpus: data.Corpus, texts: tuple[str, ...], n_val: int, seed: int) -> list[list[int]]:
    """Tokens of each text, then n_val prompts from the validation text. ValueError for one that is empty or too long."""
    T, prompts = run.config["T"], []
    for text in texts:
        prompts.append(corpus.encoding.encode_ordinary(text) if corpus.encoding.name != "ids" else [])
        if not prompts[-1]:
            raise ValueError(f"prompt={text!r} has no tokens" + (": this corpus came as token ids, its vocabulary is unknown" if text else ""))
        if len(prompts[-1]) > T:
            raise ValueError(f"prompt={text!r} has {len(prompts[-1])} tokens: the context is {T}")
    if n_val:
        prompts += corpus.batch("val", 1, n_val, min(T, PROMPT_TOKENS), seed)[:, :-1].tolist()
    return prompts


def look_at_prompt(run: Run, tokens: list[int], seed: int) -> dict[str, np.ndarray]:
    """g [T, C], and of each of MODES the five most probable next tokens [T, modes, 5], their probabilities, and KL(target || mode) in
    nats [T, modes]. rounded: 1 where g > 0; stochastic: g + (1 - g) r with r ~ U(0, 1); adversarial: as eval.py finds r in 20 steps."""
    device, D = next(run.ci_fn.parameters()).device, run.decomposition
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.tensor([tokens], device=device)
    target_output, g = run.importances(x)
    r = adversarial_sources(D, x, target_output, g, PGD_STEPS[0], generator)[0]
    with torch.no_grad():
        outputs = [target_output, *(D(x, m) for m in (masks("rounded_0.0", g, D.L, generator), masks("stochastic", g, D.L, generator), mask(g, r)))]
    log_p = torch.cat([output.float().log_softmax(-1) for output in outputs])  # [modes, T, vocab]
    kl = (log_p[0].exp() * (log_p[0] - log_p)).sum(-1).clamp(min=0)
    p, token = log_p.exp().topk(min(5, log_p.shape[-1]), -1)
    found = {"g": g[0], "token": token.transpose(0, 1), "p": p.transpose(0, 1), "kl": kl.T}
    return {name: value.cpu().numpy() for name, value in found.items()}


# ---------------------------------------------------------------------------------------------------------------------
# D. Labels


def short(name: str) -> str:
    """"blocks.1.mlp.up" to "1.mlp.up", as in the page's links."""
    return name.removeprefix("blocks.")


def read_labels(path: str | Path, names: list[str]) -> dict[str, str]:
    """{name: label} of a labels.jsonl, empty labels left out. FileNotFoundError; ValueError for what is not one, or an unknown name."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"labels={path} does not exist")
    labels, known = {}, set(names)
    for i, line in enumerate(Path(path).read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, label = row["name"], row["label"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'labels={path}: line {i} is not {{"name": ..., "label": ...}} ({type(error).__name__})') from error
        if not isinstance(name, str) or not isinstance(label, str) or name not in known:
            raise ValueError(f"labels={path}: line {i}: {name!r} is no live subcomponent of this run with a label in words; names are like {names[0]}")
        if label.strip():
            labels[name] = label.strip()
    return labels


def marked(examples: Examples, c: int, strings: list[str], T: int, n: int) -> list[str]:
    """The first n examples of subcomponent c as text, each run of tokens at which it fires in «»."""
    texts = []
    for j in range(min(n, int(examples.priority[c].isfinite().sum()))):
        t = int(examples.t[c, j])
        inside = slice(max(0, CONTEXT - t), CONTEXT + T - t)  # the window may end sooner
        pairs = zip(examples.tokens[c, j, inside].tolist(), examples.g[c, j, inside].tolist())
        texts.append("".join(f"«{strings[token]}»" if g > 0 else strings[token] for token, g in pairs).replace("»«", ""))
    return texts


def records(page: dict, arrays: dict[str, np.ndarray], h: Harvest, T: int) -> list[dict]:
    """A line of labels.jsonl for each live subcomponent: all that a person or a language model needs to say what it is, and `label`."""
    strings, rows = page["tokens"], []

    def table(kind: str, c: int, column: str) -> list:
        kept = arrays[kind + "_count"][c] > 0
        return [[strings[t], float(f"{x:.3g}")] for t, x in zip(arrays[kind + "_token"][c][kept].tolist(), arrays[f"{kind}_{column}"][c][kept].tolist())]

    for c, (matrix, number) in enumerate(zip(arrays["matrix"].tolist(), arrays["number"].tolist())):
        row = {"name": f"{page['matrices'][matrix]['name']}:{number}", "label": page["labels"].get(str(c), ""), "matrix": page["matrices"][matrix]["full"]}
        row |= {"density": h.fires[c] / h.N, "mean_g": h.sum_g[c] / h.N, "mean_activation": float(arrays["mean_a"][c])}
        row |= {"top": marked(h.top, c, strings, T, 6), "random": marked(h.random, c, strings, T, 6)}
        row |= {f"{kind}_by_{by}": table(f"{kind}_{by}", c, by) for kind in ("input", "predicted") for by in ("recall", "pmi")}
        if arrays["promoted"][c].any():
            row |= {side: [strings[t] for t in arrays["promoted_token"][c, i].tolist()] for i, side in enumerate(("promotes", "suppresses"))}
        rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# E. The page


def visible(token: bytes) -> str:
    """A token as text in which every character can be seen, but for the space: ⏎ for a line break, ␀ for a null byte, ⟨200B⟩ for a
    space without width, \\xe2 for a byte that is no character by itself."""
    text = token.decode("utf-8", "backslashreplace").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else chr(0x2400 + ord(c)) if c < " " else "␡" if c == "\x7f" else f"⟨{ord(c):04X}⟩" for c in text)


def shortened(x: np.ndarray) -> np.ndarray:
    """float32 with three to four significant digits, which gzip packs to half the size: the last 12 bits are 0."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(1 << 11)) & np.uint32(0xFFFFF000)).view(np.float32)


def steps_of_g(g: np.ndarray) -> np.ndarray:
    """g in steps of 1/OUT_OF, rounded up, so that only 0 is 0."""
    return np.ceil(g * OUT_OF).astype(np.uint8)


def pack(page: dict, arrays: dict[str, np.ndarray]) -> str:
    """Base64 of gzip of: the length of the JSON (8 bytes, little-endian), the JSON, the arrays, each from a multiple of 8 bytes.

    The JSON is `page` and `arrays`: {name: [dtype, first byte, numbers]}. Base64 has no letter that ends or begins anything in HTML.
    """
    blobs, directory, at = [], {}, 0
    for name, array in arrays.items():
        directory[name] = [array.dtype.name, at, array.size]
        blobs.append(array.tobytes() + bytes(-array.nbytes % 8))
        at += len(blobs[-1])
    text = json.dumps(page | {"arrays": directory}, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    return base64.b64encode(gzip.compress(b"".join([len(text).to_bytes(8, "little"), text, *blobs]), 9, mtime=0)).decode()


def of_the_run(run: Run, mean_g: Tensor, l0: Tensor) -> tuple[dict, np.ndarray | None]:
    """What the page says of the whole run: matrices, the table of eval.py, losses, clusters; and the cluster of each of all C."""
    C, c = run.decomposition.C, run.config
    parts = zip(C.items(), mean_g.split(list(C.values())), l0.split(list(C.values())))
    matrices = [
        {"name": short(name), "full": name, "layer": short(layer_of(name)), "C": n, "live": int((g > ALIVE).sum()), "l0": float(part.sum())}
        for (name, n), g, part in parts
    ]
    rows = read_log(run.folder) if (run.folder / "metrics.jsonl").is_file() else []
    rows = rows[:: -(-len(rows) // 250)] if rows else []
    betas = {"adversarial": c["beta_adv"], "stochastic": c["beta_stoch"], "importance": c["beta_imp"], "frequency": c["beta_freq"], "faithfulness": c["beta_delta"]}
    log = {name: [float(f"{row[name]:.4g}") for row in rows] for name in ("step", "l0", "p", "total", *betas) if rows and name in rows[0]}
    metrics = read_metrics(run.folder) if (run.folder / "metrics.json").is_file() else None
    about = {"run": run.folder.resolve().name, "matrices": matrices, "metrics": metrics, "log": log, "betas": betas, "clusters": None}
    if not (run.folder / "clusters.json").is_file():
        return about, None
    clusters, label, _ = read_clusters(run.folder, C)
    components = [[part["rank"], round(part["fill"], 3), part["frequency"]] for part in clusters["components"]]
    about["clusters"] = {"alpha": clusters["alpha"], "tau": clusters["tau"], "components": components}
    return about, np.where(label < len(components), label, -1)  # -1: it never fired where they were counted


def example_arrays(kind: str, examples: Examples, largest_a: np.ndarray) -> dict[str, np.ndarray]:
    scale = 127 / np.maximum(largest_a, 1e-30)[:, None, None]
    return {
        f"{kind}_n": examples.priority.isfinite().sum(1).numpy().astype(np.uint8), f"{kind}_t": examples.t.numpy().astype(np.uint16),
        f"{kind}_tokens": examples.tokens.numpy().astype(np.uint16), f"{kind}_g": steps_of_g(examples.g.numpy()),
        f"{kind}_a": (examples.a.numpy() * scale).round().astype(np.int8),
    }  # fmt: skip


def contents(run: Run, corpus: data.Corpus, config: "Config", h: Harvest, mean_g: Tensor, l0: Tensor, prompts: list[list[int]]) -> tuple[dict, dict]:
    """All of the page: what goes into its JSON, and the arrays, [n, ...] of the live subcomponents. See `pack`."""
    D, n = run.decomposition, len(h.live)
    columns = columns_of(h.live, D.C)
    matrix = np.repeat(np.arange(D.L), [len(c) for c in columns])
    mean_a = h.sum_a / np.maximum(1, h.fires)
    norm, heads = norms(run, columns)
    promoted_token, logits = promoted(run, columns, mean_a, h.rms_inverse)
    place, overlap = coactive(h.together, h.fires, matrix, D.L)
    page, cluster = of_the_run(run, mean_g, l0)
    page |= {
        "N": h.N, "T": run.config["T"], "context": CONTEXT, "bins": BINS, "top": TOP, "examples": h.top.t.shape[1], "alive": ALIVE, "out_of": OUT_OF,
        "eval_tokens": run.config["eval_windows"] * run.config["T"], "dataset": corpus.name, "heads": heads.shape[1], "modes": MODES, "pgd": PGD_STEPS[0],
        "tokens": [visible(corpus.encoding.decode_single_token_bytes(i)) for i in range(corpus.vocab_size)],
        "prompts": [{"tokens": tokens, "own": i < len(config.prompt)} for i, tokens in enumerate(prompts)],
    }  # fmt: skip
    arrays = {
        "live": h.live.astype(np.uint32), "matrix": matrix.astype(np.uint16), "number": np.concatenate(columns).astype(np.uint32),
        "cluster": (np.full(n, -1) if cluster is None else cluster[h.live]).astype(np.int32), "fires": h.fires.astype(np.uint32),
        "mean_g": shortened(h.sum_g / h.N), "mean_a": shortened(mean_a), "largest_a": shortened(h.largest_a), "norm": shortened(norm), "heads_norm": shortened(heads),
        "histogram_g": h.histogram_g.astype(np.uint32), "histogram_a": h.histogram_a.astype(np.uint32), "histogram_a_fires": h.histogram_a_fires.astype(np.uint32),
        "a_range": shortened(h.a_range), "promoted_token": promoted_token.astype(np.uint16), "promoted": shortened(logits),
        "coactive": place.astype(np.int32), "overlap": shortened(overlap), "all_mean_g": shortened(mean_g.numpy()),
    }  # fmt: skip
    for kind, counts, total in (("input", h.input, h.input_total), ("predicted", h.predicted, h.predicted_total)):
        for by in ("recall", "pmi"):
            table = token_table(counts, h.fires, total, h.N, by)
            arrays |= {f"{kind}_{by}_token": table["token"].astype(np.uint16), f"{kind}_{by}_count": table["count"].astype(np.uint32)}
            arrays |= {f"{kind}_{by}_{name}": shortened(table[name]) for name in ("recall", "pmi")}
    arrays |= example_arrays("top", h.top, h.largest_a) | example_arrays("random", h.random, h.largest_a)

    looks = [look_at_prompt(run, tokens, config.seed) for tokens in prompts]
    important = [np.nonzero(look["g"]) for look in looks]  # (position, column among all C) of each
    arrays |= {
        "prompt_n": np.concatenate([[0], *((look["g"] > 0).sum(1) for look in looks)]).astype(np.uint32),  # after a 0: at each position
        "prompt_c": np.concatenate([np.empty(0), *(c for _, c in important)]).astype(np.uint32),
        "prompt_g": steps_of_g(np.concatenate([np.empty(0), *(look["g"][at] for look, at in zip(looks, important))])),
    }  # fmt: skip
    for name, dtype in (("token", np.uint16), ("p", np.float32), ("kl", np.float32)):
        flat = np.concatenate([np.empty(0), *(look[name].ravel() for look in looks)]).astype(dtype)
        arrays["prompt_" + name] = shortened(flat) if dtype is np.float32 else flat
    return page, arrays


# ---------------------------------------------------------------------------------------------------------------------
# F. The run


@dataclass(frozen=True)
class Config:
    run: str  # run folder of decompose.py
    tokens: int = 131_072  # of validation text, at most all of it, over which everything is counted
    examples: int = 16  # windows of each kind, top and random, of a subcomponent; fewer for more than 3,750 subcomponents
    prompt: tuple[str, ...] = ()  # a text to look at position by position; may be given several times
    val_prompts: int = 6  # such texts from the validation text
    labels: str = ""  # a labels.jsonl with its labels filled in, to show on the page
    out: str = ""  # folder for report.html and labels.jsonl; default the run folder
    seed: int = 0  # of the text, the random examples and the masks
    data_dir: str = ""  # where token files are kept; default as in the run
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...

    def __post_init__(self) -> None:
        if min(self.tokens, self.examples) < 1 or min(self.val_prompts, self.seed) < 0:
            raise ValueError(f"tokens={self.tokens}, examples={self.examples}: must be at least 1, and val_prompts={self.val_prompts}, seed={self.seed} not negative")
        if self.examples > 255:
            raise ValueError(f"examples={self.examples}: at most 255")


def live_names(run: Run, live: np.ndarray) -> list[str]:
    """Names of the columns `live` among all C, as in the page's links: "1.mlp.up:23"."""
    return [f"{short(name)}:{c}" for name, numbers in zip(run.decomposition.names, columns_of(live, run.decomposition.C)) for c in numbers]


def report(run: Run, corpus: data.Corpus, config: Config) -> Path:
    """Harvest, write report.html and labels.jsonl, and print where; returns the path of the page.

    ValueError if nothing is live, a prompt or label does not fit, or labels.jsonl holds labels that would be lost.
    """
    began, folder = time.time(), Path(config.out) if config.out else run.folder
    evaluation = Evaluation(str(run.folder), windows=run.config["eval_windows"])
    mean_g, l0 = mean_importances(run, corpus, evaluation)
    live = np.flatnonzero(mean_g.numpy() > ALIVE)
    if not len(live):
        tokens = evaluation.windows * run.config["T"]
        raise ValueError(f"{run.folder}: no live subcomponent: none of {len(mean_g):,} has a mean g above {ALIVE:g} over {tokens:,} validation tokens; train longer, or with a smaller beta_imp")
    names = live_names(run, live)
    labels = read_labels(config.labels, names) if config.labels else {}
    kept = folder / "labels.jsonl"
    if not config.labels and kept.is_file() and any('"label": ""' not in line for line in kept.read_text(encoding="utf-8").splitlines()):
        raise ValueError(f"{kept} holds labels: give --labels={kept} to keep and show them, or move it away")
    prompts = read_prompts(run, corpus, config.prompt, config.val_prompts, config.seed)

    k = min(config.examples, max(1, MOST_EXAMPLES // (2 * len(live))))
    h = harvest(run, corpus, live, config.tokens, k, config.seed)
    page, arrays = contents(run, corpus, config, h, mean_g, l0, prompts)
    page["labels"] = {str(names.index(name)): label for name, label in labels.items()}
    template = (Path(__file__).parent / "interpret.html").read_text(encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    with written(path) as temporary:
        temporary.write_text(template.replace("{{data}}", pack(page, arrays)), encoding="utf-8")
    with written(kept) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in records(page, arrays, h, page["T"])), encoding="utf-8")
    print(f"report: {len(live):,} live subcomponents over {h.N:,} tokens, {path.stat().st_size / 1e6:.1f} MB, {time.time() - began:.0f} s; labels to fill in: {kept}")
    print(f"open {path}")
    return path


def main(config: Config) -> None:
    report(*open_run(config.run, config.data_dir, config.device), config)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
