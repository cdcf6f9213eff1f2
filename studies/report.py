"""Look at single subcomponents: one self-contained page, report.html, and labels.jsonl for whoever names them.

    python -m studies.report out/vpd-stdlib                         # 20 s on one CPU core; decompose.py ends with it
    python -m studies.report out/vpd-stdlib --prompt='for i in range(' --prompt='x = ('
    python -m studies.report out/vpd-stdlib --labels=named.jsonl    # a labels.jsonl whose labels somebody filled in

The page opens by double click, works offline and asks nothing of any network. It shows the live subcomponents of
eval.py: mean g above ALIVE on its windows. All else about them is counted by studies/harvest.py over more text.

  A. Prompts     what is important where, and what the model predicts under four masks
  B. Labels      out, for a person or a language model to fill in, and back
  C. The page    everything into report.html, the template
  D. The run

Left out: labelling by a language model; subcomponents that are not live.
"""

import csv
import difflib
import io
import json
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import data
import eval as evaluation
from cluster import read_clusters
from eval import ALIVE, Run, adversarial_sources, layer_of, masks
from flags import UserError, require
from losses import BETAS, mask
from run import run_script, write_text
from studies import harvest
from studies.harvest import Examples, Harvest, evaluated_importances, live_columns, names_of, short
from studies.page import filled, visible

MOST_EXAMPLES = 120_000  # in a report, of all subcomponents together: what keeps it under 30 MB
PROMPT_TOKENS = 64  # of a prompt taken from the validation text, at most
MODES = ("target", "rounded", "stochastic", "adversarial")  # of the prompts
ADV_STEPS = 20  # of the adversary of a prompt
OUT_OF = 255  # g in the page, in steps of 1/255

# ---------------------------------------------------------------------------------------------------------------------
# A. Prompts


def read_prompts(run: Run, corpus: data.Corpus, texts: tuple[str, ...], n_val: int, seed: int) -> list[list[int]]:
    """Tokens of each text, then n_val prompts of the validation text. UserError for one that is empty or too long."""
    T, prompts = run.config["T"], []
    for text in texts:
        if corpus.encoding.name == "ids":
            raise UserError(f"prompt={text!r}: this corpus came as token ids, its vocabulary is unknown")
        prompts.append(corpus.encoding.encode_ordinary(text))
        if not 0 < len(prompts[-1]) <= T:
            raise UserError(f"prompt={text!r} has {len(prompts[-1]) or 'no'} tokens: the context is {T}")
    if n_val:
        prompts += corpus.batch("val", 1, n_val, min(T, PROMPT_TOKENS), seed)[:, :-1].tolist()
    return prompts


def look_at_prompt(run: Run, tokens: list[int], seed: int) -> dict[str, np.ndarray]:
    """What is important at the T tokens of a prompt, and what the model predicts there under each of MODES.

    n [T]: how many subcomponents have g > 0; c, g [sum of n]: which of all C they are, and their g. token, p [T, modes,
    5]: the five most probable next tokens and their probabilities; kl [T, modes]: KL(target || mode), nats.
    Masks: rounded, 1 where g > 0; stochastic, g + (1 - g) r with r ~ U(0, 1); adversarial, r as eval.py finds it.
    """
    decomposition, generator = run.decomposition, torch.Generator(run.device).manual_seed(seed)
    x = torch.tensor([tokens], device=run.device)
    target_hidden, g, _ = run.importances(x)
    r, _, _ = adversarial_sources(decomposition, [(x, target_hidden, g)], ADV_STEPS, generator, run.kl)
    ms = [masks(mode, g, decomposition.L, generator) for mode in ("rounded_0.0", "stochastic")] + [mask(g, r[0])]
    found: dict[str, list] = {"token": [], "p": [], "kl": []}
    with torch.no_grad():
        target_log_p = run.logits(target_hidden[0]).float().log_softmax(-1)  # [T, vocab]
        for m in [None, *ms]:
            log_p = target_log_p if m is None else run.logits(decomposition(x, m)[0]).float().log_softmax(-1)
            p, token = log_p.exp().topk(min(5, log_p.shape[-1]), -1)
            kl = (target_log_p.exp() * (target_log_p - log_p)).sum(-1).clamp(min=0)
            for name, value in zip(found, (token, p, kl)):
                found[name].append(value.cpu().numpy())
    g = g[0].cpu().numpy()
    at = np.nonzero(g)
    return {"n": (g > 0).sum(1), "c": at[1], "g": g[at]} | {name: np.stack(of, 1) for name, of in found.items()}


# ---------------------------------------------------------------------------------------------------------------------
# B. Labels

OURS = {"name", "matrix", "density", "mean_g", "mean_activation", "top", "random", "promotes", "suppresses"}
OURS |= {f"{kind}_by_{by}" for kind in ("input", "predicted") for by in ("recall", "pmi")}  # all but the label


def rows_of(text: str) -> Iterator[tuple[int, str | dict]]:
    """The lines of a labels.jsonl that say something, each with its number; or what a spreadsheet makes of them.

    That is every line in quotes, as one cell, or a table with a header, between commas, semicolons or tabs; of the
    latter {column: cell}.
    """
    text = text.removeprefix("sep=;").removeprefix("sep=,")  # of Excel
    for delimiter in "" if text.lstrip().startswith("{") else ",;\t":
        table = csv.DictReader(io.StringIO(text), restval="", delimiter=delimiter)
        table.fieldnames = [column.strip().lower() for column in table.fieldnames or ()]
        if {"name", "label"} <= set(table.fieldnames):
            yield from ((table.line_num, row) for row in table if any(row.values()))
            return
    for i, line in enumerate(map(str.strip, text.split("\n")), 1):
        if line:
            yield i, next(csv.reader([line]))[0] if line.startswith('"') else line


def read_labels(path: Path) -> dict[str, dict]:
    """{name: what is written by hand} of a labels.jsonl: `label`, if not empty, and whatever else is not one of OURS.

    Or of what a spreadsheet saved of it, see rows_of. UserError for another file, or two labels of one subcomponent.
    """
    rows, by_hand, i = [], {}, 0
    must = '{"name": "...", "label": "..."}, and the file is no table with the columns name and label'
    try:
        for i, row in rows_of(path.read_text(encoding="utf-8-sig")):
            row = json.loads(row) if isinstance(row, str) else row
            if any(row.pop(None, ())):
                raise ValueError("more cells than columns")
            name, label = row["name"].strip(), "" if row["label"] is None else row["label"].strip()
            said = {key: value for key, value in (row | {"label": label}).items() if key not in OURS and value != ""}
            json.dumps(said, ensure_ascii=False).encode()  # half an emoji is no text
            rows.append((i, name, said))
    except FileNotFoundError:
        raise UserError(f"labels={path} does not exist") from None
    except UnicodeDecodeError as error:
        raise UserError(f"labels={path} is not UTF-8 ({error}): save it as that") from error
    except (ValueError, LookupError, TypeError, AttributeError, csv.Error, RecursionError) as error:
        raise UserError(f"labels={path}: line {i} is not {must} ({type(error).__name__})") from error
    for i, name, said in rows:
        if said and by_hand.setdefault(name, said) != said:
            raise UserError(f"labels={path}: line {i}: {name} has a label already")
    return by_hand


def lose_nothing(folder: Path, by_hand: dict[str, dict]) -> None:
    """UserError if there is anything written by hand where report.html, and labels.jsonl with `by_hand`, are to go."""
    page, labels = folder / "report.html", folder / "labels.jsonl"
    if labels.exists() and any(by_hand.get(name) != said for name, said in read_labels(labels).items()):
        raise UserError(f"{labels} holds labels: give --labels={labels} to keep and show them, or move it away")
    if page.exists():
        text = page.read_text(encoding="utf-8", errors="replace")
        if 'id="data">' not in text or "{{data}}" in text:  # the second is the template
            raise UserError(f"{page} is no report: give another --out, or move it away")


def marked(examples: Examples, c: int, strings: list[str], T: int, n: int) -> list[str]:
    """The first n examples of subcomponent c as text, each run of tokens at which it fires in «»."""
    texts = []
    for j in range(min(n, int(examples.priority[c].isfinite().sum()))):
        t = int(examples.t[c, j])
        inside = slice(max(0, harvest.CONTEXT - t), harvest.CONTEXT + T - t)  # the window may end sooner
        pairs = zip(examples.tokens[c, j, inside].tolist(), examples.g[c, j, inside].tolist())
        text = "".join(f"«{strings[token]}»" if g > 0 else strings[token] for token, g in pairs)
        texts.append(text.replace("»«", ""))
    return texts


def records(names: list[str], by_hand: dict[str, dict], page: dict, arrays: dict, h: Harvest) -> list[dict]:
    """A line of labels.jsonl for each live subcomponent: all that one needs to say what it is, and `label`.

    Then what is written by hand of others.
    """
    strings, rows = page["tokens"], []
    for c, name in enumerate(names):
        matrix = page["matrices"][arrays["matrix"][c]]["full"]
        row = {"name": name, "label": ""} | by_hand.get(name, {}) | {"matrix": matrix}
        row |= {"density": h.fires[c] / h.N, "mean_g": h.sum_g[c] / h.N}
        row |= {"mean_activation": float(f"{arrays['mean_a'][c]:.4g}")}
        row |= {kind: marked(getattr(h, kind), c, strings, page["T"], 6) for kind in ("top", "random")}
        for table in ("input_recall", "input_pmi", "predicted_recall", "predicted_pmi"):
            kind, by = table.split("_")
            tokens, values, counts = (arrays[f"{table}_{column}"][c].tolist() for column in ("token", by, "count"))
            best = [[strings[t], float(f"{x:.3g}")] for t, x, count in zip(tokens, values, counts) if count]
            row[f"{kind}_by_{by}"] = best
        if arrays["promoted"][c].any():
            sides = zip(("promotes", "suppresses"), arrays["promoted_token"][c].tolist())
            row |= {side: [strings[t] for t in tokens] for side, tokens in sides}
        rows.append(row)
    return rows + [{"name": name, "label": ""} | by_hand[name] for name in sorted(by_hand.keys() - names)]


# ---------------------------------------------------------------------------------------------------------------------
# C. The page


def steps_of_g(g: np.ndarray) -> np.ndarray:
    """g in steps of 1/OUT_OF, rounded up, so that only 0 is 0."""
    return np.ceil(g * OUT_OF).astype(int)


def beside(run: Run, name: str, read: Callable[[], Any]) -> Any:
    """What is read from a file in the run's folder, or None. If it is there but of no use, a line says why."""
    try:
        return read() if (run.folder / name).is_file() else None
    except UserError as error:
        print(f"report: the page is without {name}: {error}")


def read_rules(run: Run) -> dict:
    """What the page says of rules.json: the share explained, and of each subcomponent its rule in words and F1."""
    path = run.folder / "rules.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        evaluation.check_mark(path, found, run.mark, "-m studies.rules")
        of = {}
        for name, row in found["subcomponents"].items():
            values = ", ".join(row["values"][:4]) + (", …" if row["n_values"] > 4 else "")
            of[name] = [f"{row['rule']}: {values}", row["score"], row["null_95"]]
        return {"share": found["share_explained"], "score": found["mean_score"], "of": of}
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a whole rules.json of studies.rules ({type(error).__name__})") from error


def read_attributions(run: Run, names: list[str]) -> tuple[int, dict[str, np.ndarray]]:
    """What the page says of attributions.json: over how many windows; places among `names` and values, [n, TOP]."""
    path, sides = run.folder / "attributions.json", ("driven_by", "drives")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        evaluation.check_mark(path, found, run.mark, "-m studies.circuits")
        at, shape = {name: c for c, name in enumerate(names)}, (len(names), harvest.TOP)
        arrays = {side: np.full(shape, -1) for side in sides} | {f"{side}_value": np.zeros(shape) for side in sides}
        for c, name in enumerate(names):
            for side in sides:
                for j, (other, value) in enumerate(found["subcomponents"][name][side][: harvest.TOP]):
                    arrays[side][c, j], arrays[f"{side}_value"][c, j] = at[other], float(value)
        return found["windows"], arrays
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a whole attributions.json of studies.circuits ({type(error).__name__})"
        ) from error


def of_the_run(run: Run, mean_g: Tensor, l0: Tensor) -> tuple[dict, dict]:
    """What the page says of the whole run: matrices, the table of eval.py, losses, clusters."""
    C, c = run.decomposition.C, run.config
    matrices = [
        {"name": short(name), "full": name, "layer": short(layer_of(name)), "C": n, "live": int((part > ALIVE).sum())}
        | {"l0": of_l0.sum().item()}
        for (name, n), part, of_l0 in zip(C.items(), mean_g.split([*C.values()]), l0.split([*C.values()]))
    ]
    rows = evaluation.logged_steps(run.folder)
    rows = rows[:: max(1, -(-len(rows) // 250))]
    betas = {name: c.get(beta, 0.0) for name, beta in BETAS.items()}
    logged = [name for name in ("step", "l0", "p", "total", *betas) if rows and name in rows[0]]
    page = {
        "run": run.folder.resolve().name, "folder": shlex.quote(str(run.folder)), "matrices": matrices, "betas": betas,
        "alive": ALIVE, "clusters": None,
        "rules": beside(run, "rules.json", lambda: read_rules(run)),
        "metrics": beside(run, "metrics.json", lambda: evaluation.read_metrics(run.folder, run.mark)),
        "log": {name: [float(f"{row[name]:.4g}") for row in rows] for name in logged},
    }  # fmt: skip
    cluster = np.full(len(mean_g), -1)  # none, or it never fired where they were counted
    if found := beside(run, "clusters.json", lambda: read_clusters(run.folder, C, run.mark)):
        clusters, label, _ = found
        components = [[part["rank"], round(part["fill"], 3), part["frequency"]] for part in clusters["components"]]
        page["clusters"] = {"alpha": clusters["alpha"], "tau": clusters["tau"], "components": components}
        cluster = np.where(label < len(components), label, -1)
    return page, {"all_mean_g": mean_g.numpy(), "cluster": cluster[mean_g > ALIVE]}


def of_subcomponents(run: Run, h: Harvest) -> dict[str, np.ndarray]:
    """Arrays [n, ...] of the live subcomponents: all that the page says of each."""
    decomposition, columns = run.decomposition, harvest.columns_of(h.live, run.decomposition.C)
    matrix, mean_a = np.repeat(np.arange(len(columns)), [len(c) for c in columns]), h.sum_a / np.maximum(1, h.fires)
    norm, heads = harvest.norms(run, columns)
    token, logits = harvest.promoted(run, columns, mean_a, h.rms_inverse)
    place, overlap = harvest.coactive(h.together, h.fires, matrix, decomposition.L)
    arrays = {
        "live": h.live, "matrix": matrix, "number": np.concatenate(columns), "fires": h.fires, "mean_g": h.sum_g / h.N,
        "mean_a": mean_a, "largest_a": h.largest_a, "norm": norm, "heads_norm": heads, "histogram_g": h.histogram_g,
        "histogram_a": h.histogram_a, "histogram_a_fires": h.histogram_a_fires, "a_range": h.a_range,
        "promoted_token": token, "promoted": logits, "coactive": place, "overlap": overlap,
    }  # fmt: skip
    for kind, counts, total in (("input", h.input, h.input_total), ("predicted", h.predicted, h.predicted_total)):
        for by in ("recall", "pmi"):
            table = harvest.token_table(counts, h.fires, total, h.N, by)
            arrays |= {f"{kind}_{by}_{name}": values for name, values in table.items()}
    scale = 127 / np.maximum(h.largest_a, 1e-30)[:, None, None]
    for kind, examples in (("top", h.top), ("random", h.random)):
        arrays |= {f"{kind}_n": examples.priority.isfinite().sum(1).numpy(), f"{kind}_t": examples.t.numpy()}
        arrays |= {f"{kind}_tokens": examples.tokens.numpy(), f"{kind}_g": steps_of_g(examples.g.numpy())}
        arrays |= {f"{kind}_a": (examples.a.numpy() * scale).round().astype(int)}
    return arrays


def of_prompts(looks: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays of all prompts, one behind the other; prompt_n begins with a 0: its running sum says where each is."""
    if not looks:
        return {}
    flat = {name: np.concatenate([look[name].ravel() for look in looks]) for name in looks[0]}
    flat |= {"n": np.append(0, flat["n"]), "g": steps_of_g(flat["g"])}
    return {f"prompt_{name}": values for name, values in flat.items()}


# ---------------------------------------------------------------------------------------------------------------------
# D. The run


@dataclass(frozen=True)
class Config:
    run: str  # run folder of decompose.py
    tokens: int = 131_072  # of validation text, at most all of it, over which everything is counted
    examples: int = 16  # windows of each kind, top and random, of each; fewer for more than 3,750 subcomponents
    prompt: tuple[str, ...] = ()  # a text to look at position by position; may be given several times
    val_prompts: int = 6  # such texts from the validation text
    labels: str = ""  # a labels.jsonl, or a spreadsheet's table of it, with labels filled in, to show on the page
    out: str = ""  # folder for report.html and labels.jsonl; default the run folder
    seed: int = 0  # of the text, the random examples and the masks
    data_dir: str = ""  # where token files are kept; default as in the run
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...

    def __post_init__(self) -> None:
        require(self, "above 0", "tokens", "examples")
        require(self, "0 or above", "val_prompts", "seed")
        if self.examples > 255:
            raise UserError(f"examples={self.examples}: at most 255")


def report(run: Run, corpus: data.Corpus, config: Config) -> Path:
    """Harvest, write report.html and labels.jsonl, and print where; returns the path of the page.

    UserError if nothing is live, a prompt or label does not fit, or something written by hand would be lost.
    """
    began, folder = time.time(), Path(config.out) if config.out else run.folder
    mean_g, l0 = evaluated_importances(run, corpus)
    live = live_columns(run, mean_g)
    names, every = names_of(run, live), names_of(run, np.arange(len(mean_g)))
    by_hand = read_labels(Path(config.labels)) if config.labels else {}
    for name in sorted(by_hand.keys() - every):
        near = difflib.get_close_matches(name.lower(), every, 1) or names
        raise UserError(f"labels={config.labels}: {name!r} is no subcomponent of this run; names are like {near[0]}")
    dead = by_hand.keys() - names
    lose_nothing(folder, by_hand)  # before the minutes that the rest may take
    prompts = read_prompts(run, corpus, config.prompt, config.val_prompts, config.seed)
    page, arrays = of_the_run(run, mean_g, l0)
    page["attributed"] = 0  # windows of text
    if found := beside(run, "attributions.json", lambda: read_attributions(run, names)):
        page["attributed"], arrays = found[0], arrays | found[1]

    k = min(config.examples, max(1, MOST_EXAMPLES // (2 * len(live))))
    h = harvest.harvest(run, corpus, live, config.tokens, k, config.seed)
    arrays |= of_subcomponents(run, h) | of_prompts([look_at_prompt(run, tokens, config.seed) for tokens in prompts])
    page |= {
        "N": h.N, "T": run.config["T"], "context": harvest.CONTEXT, "bins": harvest.BINS, "top": harvest.TOP,
        "examples": k, "out_of": OUT_OF, "modes": MODES, "adv_steps": ADV_STEPS, "dataset": corpus.name,
        "eval_tokens": run.config["eval_windows"] * run.config["T"], "heads": arrays["heads_norm"].shape[1],
        "tokens": [visible(corpus.encoding.decode_single_token_bytes(i)) for i in range(corpus.vocab_size)],
        "prompts": [{"tokens": tokens, "own": i < len(config.prompt)} for i, tokens in enumerate(prompts)],
        "labels": {str(c): by_hand[name]["label"] for c, name in enumerate(names) if "label" in by_hand.get(name, {})},
    }  # fmt: skip
    rows = records(names, by_hand, page, arrays, h)
    folder.mkdir(parents=True, exist_ok=True)
    lose_nothing(folder, by_hand)  # somebody may have written since
    path, labels = folder / "report.html", folder / "labels.jsonl"
    write_text(path, filled("report.html", page, arrays))
    write_text(labels, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    size, seconds = f"{path.stat().st_size / 1e6:.1f} MB", f"{time.time() - began:.0f} s"
    print(f"report: {len(live):,} live subcomponents over {h.N:,} tokens, {size}, {seconds}")
    if dead:
        print(f"labels: {len(dead)} of subcomponents that are not live are kept in {labels}, but not on the page")
    print(f"labels to fill in: {labels}\nopen {path}")
    return path


def main(config: Config) -> None:
    report(*evaluation.open_run(config.run, config.data_dir, config.device), config)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
