"""Look at single subcomponents: one self-contained page, report.html, and labels.jsonl for whoever names them.

    python -m studies.report out/vpd-stdlib                          # 20 s on one CPU core; decompose.py does it at its end
    python -m studies.report out/vpd-stdlib --prompt='for i in range(' --prompt='x = ('
    python -m studies.report out/vpd-stdlib --labels=named.jsonl     # a labels.jsonl with its labels filled in, shown on the page

The page opens by double click, works offline and asks nothing of any network. It shows the live subcomponents of eval.py (mean g
above ALIVE on its windows); everything else about them is counted by studies/harvest.py over more validation text.

  A. Prompts     what is important where, and what the model predicts under four masks
  B. Labels      out, for a person or a language model to fill in, and back
  C. The page    everything into report.html, the template
  D. The run

Left out: labelling by a language model; subcomponents that are not live.
"""

import base64
import gzip
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
from cluster import open_run
from eval import ALIVE, PGD_STEPS, Run, adversarial_sources, layer_of, masks, mean_importances, read_metrics
from eval import Config as Evaluation
from losses import mask
from run import read_log, run_script, written
from studies.components import read_clusters
from studies.harvest import (
    BINS,
    CONTEXT,
    TOP,
    Examples,
    Harvest,
    coactive,
    columns_of,
    harvest,
    norms,
    promoted,
    token_table,
)

MOST_EXAMPLES = 120_000  # in a report, of all subcomponents together: what keeps it under 30 MB
PROMPT_TOKENS = 64  # of a prompt taken from the validation text, at most
MODES = ("target", "rounded", "stochastic", "adversarial")  # of the prompts
OUT_OF = 255  # g in the page, in steps of 1/255

# ---------------------------------------------------------------------------------------------------------------------
# A. Prompts


def read_prompts(run: Run, corpus: data.Corpus, texts: tuple[str, ...], n_val: int, seed: int) -> list[list[int]]:
    """Tokens of each text, then n_val prompts from the validation text. ValueError for one that is empty or too long."""
    T, prompts = run.config["T"], []
    for text in texts:
        prompts.append(corpus.encoding.encode_ordinary(text) if corpus.encoding.name != "ids" else [])
        if not prompts[-1]:
            raise ValueError(
                f"prompt={text!r} has no tokens"
                + (": this corpus came as token ids, its vocabulary is unknown" if text else "")
            )
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
        outputs = [
            target_output,
            *(
                D(x, m)
                for m in (masks("rounded_0.0", g, D.L, generator), masks("stochastic", g, D.L, generator), mask(g, r))
            ),
        ]
    log_p = torch.cat([output.float().log_softmax(-1) for output in outputs])  # [modes, T, vocab]
    kl = (log_p[0].exp() * (log_p[0] - log_p)).sum(-1).clamp(min=0)
    p, token = log_p.exp().topk(min(5, log_p.shape[-1]), -1)
    found = {"g": g[0], "token": token.transpose(0, 1), "p": p.transpose(0, 1), "kl": kl.T}
    return {name: value.cpu().numpy() for name, value in found.items()}


# ---------------------------------------------------------------------------------------------------------------------
# B. Labels


def short(name: str) -> str:
    """ "blocks.1.mlp.up" to "1.mlp.up", as in the page's links."""
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
            raise ValueError(
                f'labels={path}: line {i} is not {{"name": ..., "label": ...}} ({type(error).__name__})'
            ) from error
        if not isinstance(name, str) or not isinstance(label, str) or name not in known:
            raise ValueError(
                f"labels={path}: line {i}: {name!r} is no live subcomponent of this run with a label in words; names are like {names[0]}"
            )
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
        texts.append(
            "".join(f"«{strings[token]}»" if g > 0 else strings[token] for token, g in pairs).replace("»«", "")
        )
    return texts


def records(page: dict, arrays: dict[str, np.ndarray], h: Harvest, T: int) -> list[dict]:
    """A line of labels.jsonl for each live subcomponent: all that a person or a language model needs to say what it is, and `label`."""
    strings, rows = page["tokens"], []

    def table(kind: str, c: int, column: str) -> list:
        kept = arrays[kind + "_count"][c] > 0
        return [
            [strings[t], float(f"{x:.3g}")]
            for t, x in zip(arrays[kind + "_token"][c][kept].tolist(), arrays[f"{kind}_{column}"][c][kept].tolist())
        ]

    for c, (matrix, number) in enumerate(zip(arrays["matrix"].tolist(), arrays["number"].tolist())):
        row = {
            "name": f"{page['matrices'][matrix]['name']}:{number}",
            "label": page["labels"].get(str(c), ""),
            "matrix": page["matrices"][matrix]["full"],
        }
        row |= {"density": h.fires[c] / h.N, "mean_g": h.sum_g[c] / h.N, "mean_activation": float(arrays["mean_a"][c])}
        row |= {"top": marked(h.top, c, strings, T, 6), "random": marked(h.random, c, strings, T, 6)}
        row |= {
            f"{kind}_by_{by}": table(f"{kind}_{by}", c, by)
            for kind in ("input", "predicted")
            for by in ("recall", "pmi")
        }
        if arrays["promoted"][c].any():
            row |= {
                side: [strings[t] for t in arrays["promoted_token"][c, i].tolist()]
                for i, side in enumerate(("promotes", "suppresses"))
            }
        rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# C. The page


def visible(token: bytes) -> str:
    """A token as text in which every character can be seen, but for the space: ⏎ for a line break, ␀ for a null byte, ⟨200B⟩ for a
    space without width, \\xe2 for a byte that is no character by itself."""
    text = token.decode("utf-8", "backslashreplace").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(
        c if c.isprintable() else chr(0x2400 + ord(c)) if c < " " else "␡" if c == "\x7f" else f"⟨{ord(c):04X}⟩"
        for c in text
    )


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
    return base64.b64encode(
        gzip.compress(b"".join([len(text).to_bytes(8, "little"), text, *blobs]), 6, mtime=0)
    ).decode()


def of_the_run(run: Run, mean_g: Tensor, l0: Tensor) -> tuple[dict, np.ndarray | None]:
    """What the page says of the whole run: matrices, the table of eval.py, losses, clusters; and the cluster of each of all C."""
    C, c = run.decomposition.C, run.config
    parts = zip(C.items(), mean_g.split(list(C.values())), l0.split(list(C.values())))
    matrices = [
        {
            "name": short(name),
            "full": name,
            "layer": short(layer_of(name)),
            "C": n,
            "live": int((g > ALIVE).sum()),
            "l0": float(part.sum()),
        }
        for (name, n), g, part in parts
    ]
    rows = read_log(run.folder) if (run.folder / "metrics.jsonl").is_file() else []
    rows = rows[:: -(-len(rows) // 250)] if rows else []
    betas = {
        "adversarial": c["beta_adv"],
        "stochastic": c["beta_stoch"],
        "importance": c["beta_imp"],
        "frequency": c["beta_freq"],
        "faithfulness": c["beta_delta"],
    }
    log = {
        name: [float(f"{row[name]:.4g}") for row in rows]
        for name in ("step", "l0", "p", "total", *betas)
        if rows and name in rows[0]
    }
    metrics = read_metrics(run.folder) if (run.folder / "metrics.json").is_file() else None
    about = {
        "run": run.folder.resolve().name,
        "matrices": matrices,
        "metrics": metrics,
        "log": log,
        "betas": betas,
        "clusters": None,
    }
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


def contents(
    run: Run, corpus: data.Corpus, config: "Config", h: Harvest, mean_g: Tensor, l0: Tensor, prompts: list[list[int]]
) -> tuple[dict, dict]:
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
            arrays |= {
                f"{kind}_{by}_token": table["token"].astype(np.uint16),
                f"{kind}_{by}_count": table["count"].astype(np.uint32),
            }
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
# D. The run


@dataclass(frozen=True)
class Config:
    run: str  # run folder of decompose.py
    tokens: int = 131_072  # of validation text, at most all of it, over which everything is counted
    examples: int = (
        16  # windows of each kind, top and random, of a subcomponent; fewer for more than 3,750 subcomponents
    )
    prompt: tuple[str, ...] = ()  # a text to look at position by position; may be given several times
    val_prompts: int = 6  # such texts from the validation text
    labels: str = ""  # a labels.jsonl with its labels filled in, to show on the page
    out: str = ""  # folder for report.html and labels.jsonl; default the run folder
    seed: int = 0  # of the text, the random examples and the masks
    data_dir: str = ""  # where token files are kept; default as in the run
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...

    def __post_init__(self) -> None:
        if min(self.tokens, self.examples) < 1 or min(self.val_prompts, self.seed) < 0:
            raise ValueError(
                f"tokens={self.tokens}, examples={self.examples}: must be at least 1, and val_prompts={self.val_prompts}, seed={self.seed} not negative"
            )
        if self.examples > 255:
            raise ValueError(f"examples={self.examples}: at most 255")


def live_names(run: Run, live: np.ndarray) -> list[str]:
    """Names of the columns `live` among all C, as in the page's links: "1.mlp.up:23"."""
    return [
        f"{short(name)}:{c}"
        for name, numbers in zip(run.decomposition.names, columns_of(live, run.decomposition.C))
        for c in numbers
    ]


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
        raise ValueError(
            f"{run.folder}: no live subcomponent: none of {len(mean_g):,} has a mean g above {ALIVE:g} over {tokens:,} validation tokens; train longer, or with a smaller beta_imp"
        )
    names = live_names(run, live)
    labels = read_labels(config.labels, names) if config.labels else {}
    kept = folder / "labels.jsonl"
    if (
        not config.labels
        and kept.is_file()
        and any(line.strip() and '"label": ""' not in line for line in kept.open(encoding="utf-8"))
    ):
        raise ValueError(f"{kept} holds labels: give --labels={kept} to keep and show them, or move it away")
    prompts = read_prompts(run, corpus, config.prompt, config.val_prompts, config.seed)

    k = min(config.examples, max(1, MOST_EXAMPLES // (2 * len(live))))
    h = harvest(run, corpus, live, config.tokens, k, config.seed)
    page, arrays = contents(run, corpus, config, h, mean_g, l0, prompts)
    page["labels"] = {str(names.index(name)): label for name, label in labels.items()}
    template = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    with written(path) as temporary:
        temporary.write_text(template.replace("{{data}}", pack(page, arrays)), encoding="utf-8")
    with written(kept) as temporary:
        temporary.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in records(page, arrays, h, page["T"])),
            encoding="utf-8",
        )
    print(
        f"report: {len(live):,} live subcomponents over {h.N:,} tokens, {path.stat().st_size / 1e6:.1f} MB, {time.time() - began:.0f} s; labels to fill in: {kept}"
    )
    print(f"open {path}")
    return path


def main(config: Config) -> None:
    report(*open_run(config.run, config.data_dir, config.device), config)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
