"""Circuits: which subcomponents make this prediction, and through which others?

    python -m studies.circuits out/vpd-stdlib                                     # the study: 3 minutes on one CPU core
    python -m studies.circuits out/vpd-stdlib --prompt='    def test_x(self):'    # one prompt: under a minute
    python -m studies.circuits out/vpd-stdlib --prompt='x = (' --target_token=')'

The study finds by rule what the target can do in its validation text (studies/behaviours.py), takes prompts of it, and
fits causal importances to each: against an adversary, against random masks, against nothing but themselves, over a
sweep of the price of a node (studies/importances.py). What is left above 0 is a circuit. The paper says that circuits
of the last kind are small and break under an adversary, and that those of the first do not. That is put to the test.

It writes into <run>/circuits/, or for a prompt into <run>/circuits/prompt/: circuits.json, circuits.html (one page, no
network), graph-N.json (in the format of circuit-tracer and Neuronpedia), *.png, and importances.pt, by which the same
settings are not fitted again. The study also writes <run>/attributions.json, over text: `python -m studies.report RUN`
then shows of each subcomponent what it is driven by and what it drives.

  A. Circuits      importances of all prompts and prices, judged, beside other sets of as many nodes
  B. One circuit   the price that a rule takes; three numbers a node; edges
  C. Graph files   graph.json
  D. The page, figures
  E. The run

Left out: circuits of several predictions at once; a graph that can be run without the model.
"""

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

import data
from eval import COLOURS, Run, open_run, save_figure, subplots
from flags import UserError, require
from run import command, progress_bar, run_script, write_text, written
from studies.attribution import ablations, dataset_attributions, edges, influence, strongest, total_gradients
from studies.behaviours import Prompt, brackets, chosen_groups, groups_of, induction, prompts_of
from studies.harvest import evaluated_importances, live_columns, names_of, short
from studies.importances import VARIANTS, ce_at_end, judge, kl_at_end, largest, post_hoc
from studies.page import filled, visible

LR = 0.03  # of the importances: 0.01, the published one, moves none of Gamma's logits by more than 5 in 500 steps
OUTPUTS, SMALLEST_P = 5, 0.01  # output nodes: the target's top tokens above this probability, at most so many
SHOWN = 0.004  # of all that goes into a node, the share below which an edge is not drawn
AT_A_TIME = 1024  # positions, of rows that go through together: what fits a cache
STAGES = {"q": 0, "k": 0, "v": 0, "o": 1, "up": 2, "down": 3}


@dataclass(frozen=True)
class Config:
    run: str  # run folder of decompose.py
    prompt: str = ""  # a text that ends where the prediction is made; empty: the study
    target_token: str = ""  # what comes next, as text; default, what the target says. It must be the target's top token
    coefficients: str = "0.01,0.03,0.1,0.3,1"  # the price of a node
    steps: int = 500  # of fitting
    loss: Literal["ce", "kl"] = "ce"  # of the token alone, or of the whole prediction
    windows: int = 256  # of validation text, for the behaviours
    groups: int = 3  # of each kind, contextual and bigram
    prompts: int = 1  # of each group
    length: int = 12  # tokens of each prompt
    attribution_windows: int = 64  # for what drives what over text; 0: leave it out
    seed: int = 0
    data_dir: str = ""  # where token files are kept; default as in the run
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...

    def __post_init__(self) -> None:
        require(self, "above 0", "steps", "windows", "groups", "prompts", "length")
        require(self, "0 or above", "attribution_windows", "seed")
        self.prices()
        if self.target_token and not self.prompt:
            raise UserError(f"target_token={self.target_token!r}: give a prompt with it")

    def prices(self) -> list[float]:
        """Ascending. UserError unless they are numbers above 0, each once."""
        try:
            found = [float(x) for x in self.coefficients.split(",")]
        except ValueError:
            found = []
        if not found or len({*found}) < len(found) or not all(0 < x < 2**63 for x in found):
            raise UserError(f"coefficients={self.coefficients!r}: must be numbers above 0, as in 0.01,0.1,1")
        return sorted(found)


# ---------------------------------------------------------------------------------------------------------------------
# A. Circuits


def own_prompt(run: Run, corpus: data.Corpus, text: str, target_token: str) -> Prompt:
    """UserError for a text that is empty or too long, and a token that is none, or not what the target says."""
    if corpus.encoding.name == "ids":
        raise UserError(f"prompt={text!r}: this corpus came as token ids, its vocabulary is unknown")
    tokens, T = corpus.encoding.encode_ordinary(text), run.config["T"]
    if not 0 < len(tokens) <= T:
        raise UserError(f"prompt={text!r} has {len(tokens) or 'no'} tokens: the context is {T}")
    with torch.no_grad():
        p = run.logits(run.decomposition.f(torch.tensor([tokens], device=run.device))[0, -1]).softmax(-1)
    top = int(p.argmax())
    wanted = corpus.encoding.encode_ordinary(target_token) if target_token else [top]
    if len(wanted) != 1:
        raise UserError(f"target_token={target_token!r} is {len(wanted)} tokens: it must be one")
    if wanted[0] != top:
        says = f"{said(corpus, top)} (p = {p[top]:.3f})"
        raise UserError(f"target_token={target_token!r}: the target says {says}, and this with p = {p[wanted[0]]:.3f}")
    return Prompt(tokens, top, p[top].item(), "own")


def said(corpus: data.Corpus, token: int) -> str:
    """A token as text, in quotes, every character of it visible."""
    return f"'{visible(corpus.encoding.decode_single_token_bytes(token))}'"


@dataclass
class Fitted:
    """Of P prompts of T tokens under K prices; 1 + C columns of numbers are kept of what is above 0."""

    x: Tensor  # [P, T]
    y: Tensor  # [P]
    z: Tensor  # [P, T, C], Gamma's
    g: dict[str, Tensor]  # of each variant, [P, K, T, C]


def rows_at_a_time(T: int) -> int:
    return max(1, AT_A_TIME // T)


def fit(run: Run, prompts: list[Prompt], config: Config) -> Fitted:
    """The post-hoc importances of every prompt, price and variant. A prompt's rows are the same whatever others are."""
    prices = config.prices()
    x, y = torch.tensor([p.tokens for p in prompts], device=run.device), torch.tensor([p.y for p in prompts])
    y = y.to(run.device)
    with torch.no_grad():
        hidden, inputs = run.decomposition.target_pass(x)
        z = run.ci_fn(inputs).float()
    row = torch.arange(len(prompts), device=run.device).repeat_interleave(len(prices))
    price = torch.tensor(prices, device=run.device).repeat(len(prompts))
    parts = list(zip(row.split(rows_at_a_time(x.shape[1])), price.split(rows_at_a_time(x.shape[1]))))
    bar = progress_bar(0, len(VARIANTS) * len(parts) * config.steps, "fit")
    g = {}
    for variant in VARIANTS:
        found = []
        for rows, of_rows in parts:
            generator = torch.Generator(run.device).manual_seed(config.seed)
            one = {"ce": lambda: ce_at_end(run.decomposition, y[rows])}
            one["kl"] = lambda: kl_at_end(run.decomposition, hidden[rows])
            loss = one[config.loss]()
            tick = bar.update
            found.append(
                post_hoc(
                    run.decomposition, x[rows], loss, z[rows], of_rows, variant, config.steps, generator, LR, tick=tick
                )
            )
        g[variant] = torch.cat(found).unflatten(0, (len(prompts), len(prices)))
    bar.close()
    return Fitted(x, y, z, g)


def settings(run: Run, prompts: list[Prompt], config: Config) -> dict:
    """What the importances follow from, as text and numbers."""
    chosen = {name: getattr(config, name) for name in ("coefficients", "steps", "loss", "seed")}
    code = hashlib.sha256((Path(__file__).parent / "importances.py").read_bytes()).hexdigest()[:16]
    return {"run_mark": run.mark, "code": code, "prompts": [[p.tokens, p.y] for p in prompts]} | chosen


def fitted(run: Run, prompts: list[Prompt], config: Config, path: Path) -> Fitted:
    """`fit`, or what it gave before with these settings and weights, from `path`."""
    wanted = settings(run, prompts, config)
    try:
        saved = torch.load(path, map_location=run.device, weights_only=True)
        if saved["settings"] == wanted:
            print(f"as fitted before; to do so again, delete {path}")
            g = {
                variant: torch.zeros_like(saved["z"])[:, None].repeat(1, len(config.prices()), 1, 1)
                for variant in VARIANTS
            }
            for variant, (at, values) in saved["g"].items():
                g[variant][*at.long()] = values
            return Fitted(saved["x"], saved["y"], saved["z"], g)
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, EOFError, AttributeError):
        pass
    found = fit(run, prompts, config)
    sparse = {variant: (g.nonzero().T.to(torch.int32), g[g > 0]) for variant, g in found.g.items()}
    with written(path) as temporary:
        torch.save({"settings": wanted, "x": found.x, "y": found.y, "z": found.z, "g": sparse}, temporary)
    return found


def judged(run: Run, f: Fitted, g: Tensor, seed: int, tick=lambda: None) -> dict[str, Tensor]:
    """`judge` of importances g [P, K, T, C] on the prompts of f: [P, K] each, and `nodes`: how many are above 0."""
    K, parts = g.shape[1], []
    row = torch.arange(len(f.x), device=run.device).repeat_interleave(K)
    for rows, of_rows in zip(
        row.split(rows_at_a_time(f.x.shape[1])), g.flatten(0, 1).split(rows_at_a_time(f.x.shape[1]))
    ):
        generator = torch.Generator(run.device).manual_seed(seed + 1)
        parts.append(judge(run.decomposition, f.x[rows], f.y[rows], of_rows, f.z[rows] > 0, generator, tick))
    found = {name: torch.cat([part[name] for part in parts]).unflatten(0, (-1, K)).cpu() for name in parts[0]}
    return found | {"nodes": (g > 0).sum((2, 3)).cpu()}


def rivals(run: Run, f: Fitted, config: Config) -> dict[str, Tensor]:
    """Other importances of the same prompts, [P, K, T, C], as many nodes as the adversarial circuit of each price has.

    rounded: that circuit with every g at 1. gradient: the nodes of largest |a d logit / d a|. random: of what is alive.
    gamma: Gamma's own, at its own size, once.
    """
    g, alive = f.g["adversarial"], f.z > 0
    k = (g > 0).sum((2, 3))  # [P, K]
    score = torch.stack([total_gradients(run.decomposition, x, y)[:, : g.shape[-1]].abs() for x, y in zip(f.x, f.y)])
    generator = torch.Generator(run.device).manual_seed(config.seed + 2)
    chance = torch.rand(score.shape, generator=generator, device=run.device)
    by = lambda score: torch.stack([largest(score, alive, k[:, i]) for i in range(k.shape[1])], 1)
    return {"rounded": (g > 0).float(), "gradient": by(score), "random": by(chance), "gamma": f.z.clamp(0, 1)[:, None]}


def chosen_price(scores: dict[str, Tensor], p_target: Tensor) -> Tensor:
    """Of each prompt the highest price whose adversarial circuit keeps half the target's p under the published judge.

    If none does, the price of the highest such p. scores: `judged`, prices ascending; the result is [P].
    """
    p = scores["adversarial"]
    keeps = p >= p_target[:, None] / 2
    last = keeps.shape[1] - 1 - keeps.flip(1).int().argmax(1)
    return torch.where(keeps.any(1), last, p.argmax(1))


def transfer(run: Run, f: Fitted, prompts: list[Prompt], pick: Tensor, seed: int) -> list[dict]:
    """The chosen circuit of each prompt as importances of the others of its prediction, positions from the end.

    Of each pair: p under m = g, and under the published adversary, of `to` by itself and with the circuit of `from`.
    """
    g = f.g["adversarial"]
    own = [[i, j] for i in range(len(prompts)) for j in range(len(prompts)) if i != j and same(prompts[i], prompts[j])]
    if not own:
        return []
    fro, to = torch.tensor(own).T
    moved = Fitted(f.x[to], f.y[to], f.z[to], {})
    found = judged(run, moved, g[fro, pick[fro]][:, None], seed)
    return [
        {"from": i, "to": j, "ci": found["ci"][n, 0].item(), "adversarial": found["adversarial"][n, 0].item()}
        for n, (i, j) in enumerate(own)
    ]


def same(a: Prompt, b: Prompt) -> bool:
    return (a.tokens[-1], a.y) == (b.tokens[-1], b.y)


# ---------------------------------------------------------------------------------------------------------------------
# B. One circuit


@dataclass
class Graph:
    """All that any circuit of one prompt needs: its N nodes, three numbers of each, and the direct edges.

    Sources are nodes, then T embeddings, then L T Deltas; targets are nodes, then outputs.
    """

    tokens: list[int]
    nodes: Tensor  # [N, 2]: t, column among all C
    stage: Tensor  # [N]: grows along every edge
    outputs: list[int]  # tokens
    p: Tensor  # [M]: the target's probability of each
    weight: Tensor  # [N + M, N + T + L T]
    activation: Tensor  # [N]: a
    total: Tensor  # [N]: a d logit / d a over all paths
    ablation: Tensor  # [N]: change of the centred logit of y when it alone is ablated
    ablation_p: Tensor  # [N]: p of y then


def columns_to_matrix(run: Run) -> np.ndarray:
    """The matrix l of every column, [C]."""
    return np.repeat(np.arange(run.decomposition.L), [*run.decomposition.C.values()])


def stages(run: Run) -> Tensor:
    """[L]: 4 a block: q, k, v; o; up; down."""
    names = [name.split(".") for name in run.decomposition.names]
    return torch.tensor([4 * int(name[1]) + STAGES[name[-1]] for name in names])


def graph_of(run: Run, x: Tensor, y: int, nodes: Tensor) -> Graph:
    """The graph of a prompt x [T] over nodes int [N, 2]."""
    d = run.decomposition
    with torch.no_grad():
        hidden, inputs = d.target_pass(x[None])
        p = run.logits(hidden[0, -1]).softmax(-1)
        a = torch.cat([part @ V for part, V in zip(inputs, d.V.values())], -1)[0].detach()
    top = [t for t in p.topk(min(OUTPUTS, len(p))).indices.tolist() if p[t] > SMALLEST_P or t == y]
    outputs = torch.tensor([(len(x) - 1, t) for t in top], device=x.device)
    weight = edges(d, x, nodes, outputs)
    total, at = total_gradients(d, x, y), nodes.unbind(-1)
    logits, ps = ablations(d, x, torch.cat((nodes.new_zeros(0, 2), nodes)), y)
    with torch.no_grad():
        E = run.unembedding
        before = hidden[0, -1] @ (E[y] - E.mean(0))
    l = torch.from_numpy(columns_to_matrix(run))[nodes[:, 1].cpu()]
    found = (weight, a[*at], total[*at], logits - before, ps)
    return Graph(x.tolist(), nodes.cpu(), stages(run)[l], top, p[top].cpu(), *(v.detach().cpu() for v in found))


def influences(graph: Graph, keep: Tensor) -> Tensor:
    """`influence` of every source on the outputs, [N + T + L T], in the circuit of the nodes that keep [N] says.

    1 is all that there is: over all embeddings and Deltas it adds up to 1, each output by its share of their p.
    """
    N = len(keep)
    weight = graph.weight.clone()
    weight[:, :N][:, ~keep] = 0
    found = influence(weight, N, graph.p / graph.p.sum(), graph.stage)
    return torch.where(torch.cat((keep, torch.ones(len(found) - N, dtype=torch.bool))), found, 0.0)


def spearman(a: Tensor, b: Tensor) -> float | None:
    """Rank correlation, None of fewer than 3."""
    if len(a) < 3:
        return None
    ranks = torch.stack([v.argsort().argsort().double() for v in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


def delta_share(graph: Graph, keep: Tensor, L: int) -> float:
    """Of all |edges| into the nodes and outputs of a circuit the share that comes from Delta, mean over them."""
    N, T = len(keep), len(graph.tokens)
    rows = torch.cat((keep, torch.ones(len(graph.outputs), dtype=torch.bool)))
    weight = graph.weight[rows].abs()
    columns = torch.cat((keep, torch.ones(weight.shape[1] - N, dtype=torch.bool)))
    return (weight[:, N + T :].sum(1) / weight[:, columns].sum(1).clamp(min=1e-30)).mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# C. Graph files


def graph_json(run: Run, corpus: data.Corpus, graph: Graph, g: Tensor, labels: dict[str, str], slug: str) -> dict:
    """The circuit of importances g [N] in the format of circuit-tracer and Neuronpedia (schema 1).

    layer: 4 a block (q, k, v; o; up; down), then the outputs; "E" for embeddings. feature: column among all C; of a
    Delta's error node -1, -2 or -3, for q, k and v, which share a layer. weight: the edge, not multiplied by g, which
    is the node's `importance`. influence: of the outputs, the cumulative share of it down to this node, largest first.
    """
    d, N, T = run.decomposition, len(graph.nodes), len(graph.tokens)
    keep, text = g > 0, [visible(corpus.encoding.decode_single_token_bytes(t)) for t in graph.tokens]
    quoted = lambda t: visible(corpus.encoding.decode_single_token_bytes(t)).replace('"', "″")
    of_source, names = influences(graph, keep), names_in_order(run, graph.nodes[:, 1])
    order = of_source.argsort(descending=True)
    cumulative = torch.empty_like(of_source)
    cumulative[order] = (of_source[order].cumsum(0) / of_source.sum().clamp(min=1e-30)).clamp(max=1)
    nodes, ids, top = [], {}, int(stages(run).max()) + 1

    def add(source, node_id, feature, layer, t, kind, js, clerp, **more) -> None:
        ids[source] = node_id
        nodes.append(
            {"node_id": node_id, "feature": feature, "layer": layer, "ctx_idx": t, "feature_type": kind, "jsNodeId": js}
            | {"clerp": clerp, "influence": None, "token_prob": 0, "is_target_logit": False}
            | {
                "run_idx": 0,
                "reverse_ctx_idx": 0,
                "influence": round(cumulative[source].item(), 6) if source >= 0 else 0,
            }
            | more
        )

    for n in keep.nonzero()[:, 0].tolist():
        (t, c), layer = graph.nodes[n].tolist(), int(graph.stage[n])
        clerp = " ".join(filter(None, (names[n], labels.get(names[n], ""))))
        more = {"activation": graph.activation[n].item(), "importance": g[n].item()}
        more |= {"total_gradient": graph.total[n].item(), "ablation": graph.ablation[n].item()}
        js = f"{layer}_{c}-0"
        add(n, f"{layer}_{c}_{t}", c, str(layer), t, "cross layer transcoder", js, clerp, **more)
    for t, token in enumerate(graph.tokens):
        add(N + t, f"E_{token}_{t}", t, "E", t, "embedding", f"E_{token}-{t}", f'Emb: "{quoted(token)}"')
    rows = torch.cat((keep, torch.ones(len(graph.outputs), dtype=torch.bool)))
    reached = (graph.weight[rows] != 0).any(0)
    for l, name in enumerate(d.names):
        layer, minus = int(stages(run)[l]), {"k": -2, "v": -3}.get(name.split(".")[-1], -1)
        for t in range(T):
            if reached[source := N + T + l * T + t]:
                js, clerp = f"{layer}_{minus}-{t}", f'Err: Delta of {short(name)} "{quoted(graph.tokens[t])}"'
                add(source, f"{layer}_{minus}_{t}", minus, str(layer), t, "mlp reconstruction error", js, clerp)
    targets = {n: ids[n] for n in keep.nonzero()[:, 0].tolist()}
    for m, (token, p) in enumerate(zip(graph.outputs, graph.p.tolist())):
        clerp, node_id = f'Output "{quoted(token)}" (p={p:.3f})', f"{top}_{token}_{T - 1}"
        more = {"token_prob": p, "is_target_logit": m == 0}
        add(-1 - m, node_id, token, str(top), T - 1, "logit", f"L_{token}-{T - 1}", clerp, **more)
        targets[N + m] = node_id
    links = [
        {"source": ids[s], "target": targets[n], "weight": graph.weight[n, s].item()}
        for n in targets
        for s in graph.weight[n].nonzero()[:, 0].tolist()
        if s in ids
    ]
    metadata = {"slug": slug, "scan": "vpd", "prompt_tokens": text, "prompt": "".join(text), "transcoder_list": []}
    metadata |= {
        "node_threshold": 1.0,
        "schema_version": 1,
        "info": {"creator_name": "vpd", "generator": {"name": "vpd"}},
    }
    params = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    return {"metadata": metadata, "qParams": params, "nodes": nodes, "links": links}


def names_in_order(run: Run, columns: Tensor) -> list[str]:
    """Names of columns among all C, in any order and more than once: "1.mlp.up:23"."""
    every = names_of(run, np.arange(sum(run.decomposition.C.values())))
    return [every[c] for c in columns.tolist()]


# ---------------------------------------------------------------------------------------------------------------------
# D. The page, figures


def read_examples(run: Run) -> dict[str, dict]:
    """{name: row} of labels.jsonl, if the report has written one of this training: its label, examples and tokens."""
    path = run.folder / "labels.jsonl"
    if not path.is_file():
        return {}
    if path.stat().st_mtime < (run.folder / "checkpoint.pt").stat().st_mtime:
        print(f"circuits: {path} is older than the checkpoint beside it, and left out: run -m studies.report again")
        return {}
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return {row["name"]: row for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        print(f"circuits: {path} is not a labels.jsonl, and left out ({type(error).__name__})")
        return {}


def of_page(run: Run, i: int, graph: Graph, g: Tensor) -> tuple[dict, dict[str, np.ndarray]]:
    """What the page needs of prompt i: a JSON, and arrays whose names begin with its number. g [variants, K, N]."""
    N, T, shape = len(graph.nodes), len(graph.tokens), g.shape[:2]
    of = torch.stack([influences(graph, keep) for keep in (g > 0).flatten(0, 1)])  # [variants * K, sources]
    share = graph.weight.abs() / graph.weight.abs().sum(1, keepdim=True).clamp(min=1e-30)
    target, source = (share > SHOWN).nonzero().T
    arrays = {
        "t": graph.nodes[:, 0], "column": graph.nodes[:, 1], "activation": graph.activation, "total": graph.total,
        "ablation": graph.ablation, "ablation_p": graph.ablation_p, "g": (g * 255).ceil().int(), "influence": of,
        "source": source, "target": target, "weight": graph.weight[target, source], "share": share[target, source],
    }  # fmt: skip
    page = {
        "tokens": graph.tokens,
        "outputs": graph.outputs,
        "p": graph.p.tolist(),
        "N": N,
        "T": T,
        "rows": list(shape),
    }
    return page, {f"{i}_{name}": value.numpy().ravel() for name, value in arrays.items()}


def plot_graph(
    run: Run, corpus: data.Corpus, graph: Graph, keep: Tensor, title: str, path: Path, most: int = 60
) -> None:
    """A circuit: tokens as columns, matrices as rows, nodes by influence, the `most` edges of largest share of it."""
    d, N, T = run.decomposition, len(keep), len(graph.tokens)
    text = [visible(corpus.encoding.decode_single_token_bytes(t)).replace(" ", "·") for t in graph.tokens]
    matrix, of = columns_to_matrix(run)[graph.nodes[:, 1]], influences(graph, keep)
    rows = ["embedding", *(short(name) for name in d.names), "output"]
    place, taken = {}, {}
    for n in keep.nonzero()[:, 0].tolist():
        place[n] = (graph.nodes[n, 0].item(), matrix[n] + 1)
        taken.setdefault(place[n], []).append(n)
    at = {}
    for (t, row), here in taken.items():
        here.sort(key=lambda n: -of[n])
        for j, n in enumerate(here):
            at[n] = (t + (j + 1) / (len(here) + 1) - 0.5, row + (0.18 * (-1) ** j if len(here) > 6 else 0))
    at |= {N + t: (t, 0) for t in range(T)} | {-1: (T - 1, len(rows) - 1)}
    figure, ax = subplots(1, 1, (0.8 * T + 1.8, 0.4 * len(rows) + 1.2))
    drawn = []
    for n, (x, y) in at.items():
        if n < N and (n >= 0 or n == -1):
            row = graph.weight[N if n == -1 else n]
            out = 1.0 if n == -1 else of[n].item()
            total = row[: N + T].abs().sum() + row[N + T :].abs().sum()
            for s in row.nonzero()[:, 0].tolist():
                if s in at and s != n:
                    drawn.append((out * (row[s].abs() / total).item(), row[s].item(), s, n))
    largest_share = max((share for share, *_ in drawn), default=1.0)
    for share, weight, s, n in sorted(drawn)[-most:]:
        (x0, y0), (x1, y1) = at[s], at[n]
        line = {"color": "#0072b2", "ls": "-"} if weight > 0 else {"color": "#d55e00", "ls": (0, (4, 2))}
        strength = (share / largest_share) ** 0.5
        ax.plot([x0, x1], [y0, y1], lw=0.4 + 2.6 * strength, alpha=0.15 + 0.75 * strength, zorder=1, **line)
    for n, (x, y) in at.items():
        kind = "" if n < 0 or n >= N else d.names[matrix[n]].split(".")[-1]
        size = 90 if n == -1 else 12 + 260 * of[n].item()
        ax.scatter([x], [y], s=size, color=COLOURS.get(kind, "#555555"), edgecolor="white", lw=0.5, zorder=2)
    names = names_in_order(run, graph.nodes[:, 1])
    said_of = sorted((n for n in at if 0 <= n < N), key=lambda n: -of[n])[:14]
    for n in said_of:
        ax.annotate(
            ":" + names[n].split(":")[1], at[n], xytext=(0, 7), textcoords="offset points", fontsize=6.5, ha="center"
        )
    answer = visible(corpus.encoding.decode_single_token_bytes(graph.outputs[0])).replace(" ", "·")
    ax.annotate(f"“{answer}”", at[-1], xytext=(9, -3), textcoords="offset points", fontsize=9)
    ax.set_xticks(range(T), text, fontsize=8, family="monospace", rotation=30, ha="right")
    ax.set_yticks(range(len(rows)), rows, fontsize=8)
    ax.set(xlim=(-0.7, T + 0.4), ylim=(-0.6, len(rows) - 0.4))
    ax.set_title(title, fontsize=9)
    ax.grid(color="#f0f0f0", lw=0.6)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    save_figure(figure, path)


STYLES = {  # of a set of nodes: colour, marker, words
    "adversarial": ("#d55e00", "o", "adversarial"), "stochastic": ("#0072b2", "s", "stochastic alone"),
    "ci": ("#009e73", "^", "CI alone"), "rounded": ("#f0b48a", "o", "adversarial, rounded to g = 1"),
    "gradient": ("#7f7f7f", "v", "largest |gradient × activation|"),
    "random": ("#bdbdbd", "x", "random, of what is alive"), "gamma": ("#000000", "*", "Γ's own g"),
}  # fmt: skip


def plot_sizes(scores: dict[str, dict], path: Path) -> None:
    """p of the label against nodes, mean over prompts at each price, a panel a judge; scores: [P][K] lists a set."""
    panels = {"ci": "m = g", "stochastic": "random masks", "adversarial": "adversary, 4 × 1.0"}
    panels |= {"adversarial_20": "adversary, 20 × 0.1, 4 starts"}
    figure, axes = subplots(1, len(panels), (3.6 * len(panels) + 0.6, 4), sharey=True)
    for ax, (judge_name, title) in zip(axes, panels.items()):
        for name, (colour, marker, words) in STYLES.items():
            nodes, p = (np.array(scores[name][of]).mean(0) for of in ("nodes", judge_name))
            order = np.argsort(nodes)
            ax.plot(nodes[order], p[order], marker=marker, color=colour, ms=5, lw=1.2, label=words)
        ax.set(xscale="symlog", title=title, xlabel="nodes, mean over prompts", ylim=(-0.03, 1.03))
        ax.axhline(scores["p_target"], color="#7f7f7f", lw=1, ls="--", label="the target")
        ax.grid(color="#eeeeee", lw=0.6)
    axes[0].set_ylabel("p of the label, mean over prompts")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# E. The run


def behaviours(run: Run, corpus: data.Corpus, config: Config) -> tuple[dict, list[Prompt]]:
    """What the target can do, in words and numbers; prompts of it from other windows. UserError if there is none."""
    T, n = run.config["T"], config.windows
    if config.length > T:
        raise UserError(f"length={config.length}: the context is {T}")
    windows, other = (corpus.batch("val", draw, n, T, config.seed) for draw in (0, 1))
    groups = groups_of(run, windows)
    chosen = chosen_groups(groups, config.groups)
    prompts = [p for group in chosen for p in prompts_of(run, group, other, config.length, config.prompts)]
    if not prompts:
        why = f"no prediction of p >= 0.5 that is right and comes again in {n} other windows"
        raise UserError(f"{run.folder}: {why}; take more windows or a shorter length")
    row = lambda g: {
        "current": said(corpus, g.current), "predicted": said(corpus, g.predicted), "kind": g.kind, "positions": g.n,
        "p": g.p, "p_without_attention": g.p_without, "chosen": g in chosen,
    }  # fmt: skip
    first, second = induction(run, windows, config.seed)
    shown = [[g for g in groups if g.kind == kind][:10] for kind in ("contextual", "bigram")]
    found = {"positions": n * T, "right_and_sure": sum(g.n for g in groups)}
    found |= {kind: sum(g.n for g in groups if g.kind == kind) for kind in ("contextual", "bigram")}
    found |= {"groups": [row(g) for g in dict.fromkeys([*sum(shown, []), *chosen])]}
    found |= {"induction": {"first_half": first, "second_half": second}, "brackets": brackets(run, corpus, windows)}
    return found, prompts


def behaviours_table(found: dict) -> str:
    lines = [f"right with p >= 0.5 at {found['right_and_sure']:,} of {found['positions']:,} positions:"]
    lines[0] += f" {found['contextual']:,} contextual, {found['bigram']:,} bigram"
    head = ("kind", "token", "next", "positions", "p", "without attention")
    lines.append("{:11s} {:18s} {:22s} {:>9s} {:>6s} {:>18s}".format(*head))
    for g in found["groups"]:
        of = (g["kind"], g["current"], g["predicted"], g["positions"], g["p"], g["p_without_attention"])
        lines.append("{:11s} {:18s} {:22s} {:9d} {:6.3f} {:18.3f}".format(*of) + ("  *" if g["chosen"] else ""))
    first, second = found["induction"].values()
    there = "there" if second < first - 1 else "not there"
    lines.append(f"induction: {there}; CE {first:.2f} nats a token, {second:.2f} once they are repeated")
    if b := found["brackets"]:
        of = f"{b['moved']:.0%} of {b['pairs']} pairs, by {b['mean']:.2f} on average"
        lines.append(f"brackets: another opening bracket lowers the logit of the closing one in {of};")
        lines.append(f"          the closing one of greater logit is right in both texts of {b['right']:.0%}")
    return "\n".join(lines)


def circuits_table(scores: dict[str, dict], prices: list[float]) -> str:
    head = ("nodes of", "price", "nodes", "m = g", "random", "adv. 4x1.0", "adv. 20x0.1")
    lines = ["p of the label, mean over prompts; the target's: " + f"{scores['p_target']:.3f}"]
    lines.append("{:14s} {:>7s} {:>7s} {:>7s} {:>7s} {:>11s} {:>12s}".format(*head))
    for name in STYLES:
        of = {key: np.array(values).mean(0) for key, values in scores[name].items()}
        for k, nodes in enumerate(of["nodes"]):
            price = f"{prices[k]:g}" if name != "gamma" else ""
            p = [of[key][k] for key in ("ci", "stochastic", "adversarial", "adversarial_20")]
            lines.append(
                f"{name if k == 0 else '':14s} {price:>7s} {nodes:7.1f} "
                + "{:7.3f} {:7.3f} {:11.3f} {:12.3f}".format(*p)
            )
    return "\n".join(lines)


def study(run: Run, corpus: data.Corpus, prompts: list[Prompt], config: Config, folder: Path, found: dict) -> None:
    """Fit, judge, draw and write everything of these prompts; found: what is known of them."""
    began, prices = time.time(), config.prices()
    f = fitted(run, prompts, config, folder / "importances.pt")
    p_target, kinds = torch.tensor([p.p for p in prompts]), f.g | rivals(run, f, config)
    bar = progress_bar(0, len(kinds), "judge")
    scores = {}
    for name, g in kinds.items():
        scores[name] = judged(run, f, g, config.seed)
        bar.update()
    bar.close()
    pick, text = chosen_price(scores["adversarial"], p_target), read_examples(run)
    labels = {name: row.get("label", "") for name, row in text.items()}
    lists = {name: {key: value.tolist() for key, value in of.items()} for name, of in scores.items()}
    lists["p_target"] = p_target.mean().item()
    page = {
        "run": run.folder.resolve().name, "variants": VARIANTS, "prices": prices, "labels": labels, "prompts": [],
        "report": os.path.relpath(run.folder / "report.html", folder) if (run.folder / "report.html").is_file() else "",
        "matrices": [{"name": short(n), "full": n, "C": C} for n, C in run.decomposition.C.items()],
        "tokens": [visible(corpus.encoding.decode_single_token_bytes(i)) for i in range(corpus.vocab_size)],
    }  # fmt: skip
    arrays, rows, used, metadata = {}, [], set(), []
    bar = progress_bar(0, len(prompts), "graphs")
    for i, prompt in enumerate(prompts):
        g = torch.stack([f.g[variant][i] for variant in VARIANTS])  # [variants, K, T, C]
        nodes = (g > 0).any(0).any(0).nonzero()
        graph = graph_of(run, f.x[i], prompt.y, nodes)
        g = g[:, :, *nodes.unbind(-1)].cpu()  # [variants, K, N]
        part, of_graph = of_page(run, i, graph, g)
        own = g[0, pick[i]]
        keep, ids = own > 0, names_in_order(run, nodes[:, 1])
        used.update(ids)
        scored = {v: {k: scores[v][k][i].tolist() for k in ("nodes", *MASKS)} for v in VARIANTS}
        part |= {"y": prompt.y, "p_target": prompt.p, "kind": prompt.kind, "pick": pick[i].item(), "scores": scored}
        page["prompts"].append(part)
        arrays |= of_graph
        slug = f"graph-{i + 1}" if len(prompts) > 1 else "graph"
        file = graph_json(run, corpus, graph, own, labels, slug)
        write_text(folder / f"{slug}.json", json.dumps(file) + "\n")
        metadata.append(file["metadata"])
        of, top = influences(graph, keep)[: len(keep)], int(pick[i])
        said_text = "".join(visible(corpus.encoding.decode_single_token_bytes(t)) for t in prompt.tokens)
        p_adv = scores["adversarial"]["adversarial"][i, top].item()
        title = f"{said_text[-60:]} → {said(corpus, prompt.y)}\n{int(keep.sum())} nodes at price {prices[top]:g};"
        title += f" p of the target {prompt.p:.2f}, under the published adversary {p_adv:.2f}"
        plot_graph(run, corpus, graph, keep, title, folder / f"{slug}.png")
        of_matrix = np.bincount(
            columns_to_matrix(run)[nodes[keep.to(nodes.device), 1].cpu()], minlength=run.decomposition.L
        )
        rows.append({
            "text": said_text, "predicted": said(corpus, prompt.y), "kind": prompt.kind, "p_target": prompt.p,
            "tokens": prompt.tokens, "y": prompt.y, "price": prices[top], "nodes": int(keep.sum()),
            "per_matrix": dict(zip(map(short, run.decomposition.names), of_matrix.tolist())),
            "spearman": spearman(-graph.total[keep], graph.ablation[keep]),
            "delta_share": delta_share(graph, keep, run.decomposition.L),
            "strongest": [
                {"name": ids[n], "t": nodes[n, 0].item(), "token": said(corpus, prompt.tokens[nodes[n, 0]]),
                 "influence": of[n].item(), "importance": own[n].item(), "total_gradient": graph.total[n].item(),
                 "ablation": graph.ablation[n].item(), "p_ablated": graph.ablation_p[n].item()}
                for n in of.argsort(descending=True)[: min(10, int(keep.sum()))].tolist()
            ],
        })  # fmt: skip
        bar.update()
    bar.close()
    page["subcomponents"] = {
        name: {key: text[name][key][:n] for key, n in (("top", 3), ("input_by_recall", 5)) if key in text[name]}
        for name in sorted(used & text.keys())
    }
    page["labels"] = {name: label for name, label in labels.items() if label and name in used}
    write_text(folder / "graph-metadata.json", json.dumps({"graphs": metadata}) + "\n")
    write_text(folder / "circuits.html", filled("circuits.html", page, arrays))
    plot_sizes(lists, folder / "sizes.png")
    found |= {
        "command": command(), "run_mark": run.mark, "steps": config.steps, "loss": config.loss, "prices": prices,
        "prompts": rows, "scores": lists, "transfer": transfer(run, f, prompts, pick, config.seed),
        "seconds": time.time() - began,
    }  # fmt: skip
    write_text(folder / "circuits.json", json.dumps(found, indent=2) + "\n")
    print(circuits_table(lists, prices))
    for row in rows:
        print(f"{row['text'][-40:]!r:44s} -> {row['predicted']}: {row['nodes']} nodes at price {row['price']:g}")
    print(f"written: {folder}/circuits.json, graph*.json, *.png\nopen {folder}/circuits.html")


MASKS = ("ci", "stochastic", "adversarial", "adversarial_20")


def attribute(run: Run, corpus: data.Corpus, live: np.ndarray, config: Config) -> None:
    """attributions.json: of each live subcomponent the ten that drive it most over text, and the ten that it drives."""
    windows = corpus.batch("val", 0, config.attribution_windows, run.config["T"], config.seed)[:, :-1]
    batches = [(x, run.importances(x)[1]) for x in run.batches(windows)]
    bar = progress_bar(0, len(live) * len(batches), "attributions")
    A = dataset_attributions(run.decomposition, batches, live, tick=bar.update)
    bar.close()
    names = names_of(run, live)
    sides = {"driven_by": strongest(A), "drives": strongest(A.T)}
    of = {
        name: {
            side: [[names[j], float(f"{v:.4g}")] for j, v in zip(place[c].tolist(), value[c].tolist()) if j >= 0]
            for side, (place, value) in sides.items()
        }
        for c, name in enumerate(names)
    }
    found = {"run_mark": run.mark, "command": command(), "windows": config.attribution_windows, "seed": config.seed}
    write_text(run.folder / "attributions.json", json.dumps(found | {"subcomponents": of}) + "\n")
    print(f"written: {run.folder}/attributions.json; `python -m studies.report {run.folder}` shows it on the report")


def main(config: Config) -> None:
    run, corpus = open_run(config.run, config.data_dir, config.device, ours=True)
    refuse_other_targets(run)
    live = live_columns(run, evaluated_importances(run, corpus)[0])
    folder = run.folder / "circuits" / ("prompt" if config.prompt else "")
    if config.prompt:
        prompts, found = [own_prompt(run, corpus, config.prompt, config.target_token)], {}
    else:
        found, prompts = behaviours(run, corpus, config)
        print(behaviours_table(found) + "\n")
        found = {"behaviours": found}
    folder.mkdir(parents=True, exist_ok=True)
    study(run, corpus, prompts, config, folder, found)
    if not config.prompt and config.attribution_windows:
        attribute(run, corpus, live, config)


def refuse_other_targets(run: Run) -> None:
    """UserError unless the decomposed matrices are those of model.GPT: nothing else has stages."""
    for name in run.decomposition.names:
        if name.split(".")[-1] not in STAGES:
            raise UserError(f"{run.folder}: {name} is no matrix of model.GPT: its place in a graph is unknown")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
