"""How many subcomponents a simple rule explains: interpretability as a number, without a reader's eyes.

    python -m studies.rules out/vpd-stdlib          # half a minute on one CPU core, for 65,536 tokens

A *rule* says at which positions a subcomponent fires (g > 0): where one of RULES, say the current token, is in a set of
values. Half of the windows choose the set, and which rule of the six; the other half judges it by the same score:

    F1 = 2 |rule and fires| / (|rule| + |fires|), in [0, 1]; 1 where both are the same positions, 0 where nothing is

Against it stands a null: the same, set and choice included, where what a window's firings meet is another window,
rotated, so that a subcomponent fires as often, in the same bursts, but at nothing. A subcomponent is *explained* if its
score is above the null's 95 % quantile; of subcomponents that fire at random one in twenty would be.

Writes <run>/rules.json, from which report.py says of each subcomponent its rule. Left out: rules of two conditions,
rules about tokens further back, and any language model.
"""

import json
import time
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from tqdm import tqdm

import data
import eval as evaluation
from eval import Run
from flags import UserError, require
from run import run_script, write_text
from studies.harvest import evaluated_importances, live_columns, names_of, one_hot, window_starts

RULES = ("token", "previous token", "predicted token", "character class", "indentation", "position")
MOST_COLUMNS = 64  # of indentation
QUANTILE = 0.95  # of the null
SHOWN = 8  # values of a rule's set that are written, those with most firings first
FEW = 5  # firings in a half; below, a score says little

# ---------------------------------------------------------------------------------------------------------------------
# A. What rules are about: a number at each position, [windows, T] each


def character_class(token: bytes) -> str:
    """Of the characters of a token: "lower", "space + Capital", "newline + indentation", "digits", ..."""
    text = token.decode("utf-8", "replace")
    body = text.strip()
    if not body:
        if "\n" in text:
            return "newline" if text.endswith("\n") else "newline + indentation"
        return "space" if text == " " else "indentation"
    before = "newline + " if "\n" in text[: text.index(body)] else "space + " if text[0].isspace() else ""
    letters = body.replace("_", "")
    if body.isdigit():
        kind = "digits"
    elif body.isalpha():
        kind = next((kind for kind, of in (("lower", body.islower()), ("UPPER", body.isupper())) if of), "")
        kind = kind or ("Capital" if body[0].isupper() and body[1:].islower() else "mIxed")
    elif not letters:
        kind = "underscores"
    elif letters.isalnum():
        kind = "word with _ or digits"
    else:
        kind = "mixed" if any(c.isalnum() for c in body) else "punctuation"
    return before + kind


def indentation(x: np.ndarray, tokens: list[bytes]) -> np.ndarray:
    """Columns of white space before the line in which each position's token ends, as far as read by then.

    At most MOST_COLUMNS; one more where no line has begun yet. A tab is 4 columns. x [windows, T].
    """
    after = [token.rpartition(b"\n") for token in tokens]
    begins = np.array([bool(newline) for _, newline, _ in after])
    blank = np.array([not line.strip(b" \t") for _, _, line in after])  # still before the line's first letter
    white = [line[: len(line) - len(line.lstrip(b" \t"))] for _, _, line in after]
    columns = np.array([len(part) + 3 * part.count(b"\t") for part in white])
    level, before = np.full(len(x), MOST_COLUMNS + 1), np.zeros(len(x), bool)
    levels = np.empty(x.shape, np.int64)
    for t, token in enumerate(x.T):
        level = np.where(begins[token], columns[token], level + before * columns[token])
        level = np.where(begins[token] | before, np.minimum(level, MOST_COLUMNS), level)
        before = (begins[token] | before) & blank[token]
        levels[:, t] = level
    return levels


@dataclass
class Positions:
    """What the rules can see at N = windows * T positions, and what they are to tell."""

    values: list[np.ndarray]  # of each of RULES: [windows, T]
    sizes: list[int]  # of each: values are below it
    names: list[list[str]]  # of each: what a value is called
    fires: sp.csr_matrix  # [N, n]

    def half(self, which: int) -> tuple[list[np.ndarray], sp.csr_matrix]:
        """The values and, by subcomponent, the firings [n, N / 2] of one half of the windows, which are in no order."""
        windows, T = self.values[0].shape
        middle = windows // 2
        part = slice(0, middle) if which == 0 else slice(middle, windows)
        fires = self.fires[part.start * T : part.stop * T]
        return [values[part] for values in self.values], fires.T.tocsr()


def look(run: Run, corpus: data.Corpus, live: np.ndarray, n_tokens: int, seed: int) -> Positions:
    """One pass over n_tokens of the validation text. A line's beginning is looked for in the T tokens before, too."""
    T, text, vocab = run.config["T"], corpus.tokens["val"], corpus.vocab_size
    starts = window_starts(corpus, T, n_tokens, seed)
    x = text[starts[:, None] + np.arange(T)].astype(np.int64)  # [windows, T]
    tokens = [corpus.encoding.decode_single_token_bytes(i) for i in range(vocab)]
    classes = [character_class(token) for token in tokens]
    every = sorted(set(classes))
    ahead = np.where(starts >= T, starts - T, starts)  # of the text's first window: itself
    read = np.concatenate((text[ahead[:, None] + np.arange(T)].astype(np.int64), x), 1)
    predicted, fires = [], []
    bar = tqdm(total=x.size, desc="rules: looking", unit=" tokens", unit_scale=True, mininterval=1, leave=False)
    with bar:
        for part in (b for batch in run.batches(torch.from_numpy(x)) for b in batch.split(64)):
            hidden, g, _ = run.importances(part)
            predicted += [run.logits(h).argmax(-1).cpu().numpy() for h in hidden.flatten(0, 1).split(2048)]
            fires.append(sp.csr_matrix(g[..., torch.from_numpy(live).to(g.device)].flatten(0, 1).cpu().numpy() > 0))
            bar.update(part.numel())
    previous = np.concatenate((np.full((len(x), 1), vocab), x[:, :-1]), 1)
    values = [x, previous, np.concatenate(predicted).reshape(x.shape), np.array([every.index(c) for c in classes])[x]]
    values += [indentation(read, tokens)[:, T:], np.broadcast_to(np.arange(T), x.shape)]
    shown = [repr(token.decode("utf-8", "backslashreplace")) for token in tokens]
    names = [shown, [*shown, "the window's first"], shown, every]
    names += [[*map(str, range(MOST_COLUMNS + 1)), "unknown"], [*map(str, range(T))]]
    return Positions(values, [len(of) for of in names], names, sp.vstack(fires, format="csr").astype(np.int32))


# ---------------------------------------------------------------------------------------------------------------------
# B. A rule is a set of values


def f1(both: np.ndarray, rule: np.ndarray, fires: np.ndarray) -> np.ndarray:
    """2 |rule and fires| / (|rule| + |fires|); 0 where nothing is."""
    return 2 * both / np.maximum(1, rule + fires)


def fit(counts: sp.csr_matrix, total: np.ndarray, fires: np.ndarray) -> tuple[sp.csr_matrix, np.ndarray]:
    """For each of n subcomponents the set of values of highest F1, [n, values], and that F1, [n].

    counts [n, values]: positions where it fires, by value; total [values]: all positions; fires [n]. Values enter in
    the order of their firing rate. One position more, at which all fire as often as anywhere, is counted with each
    value, so that one chance meeting is less than ten meetings of ten.
    """
    n, sizes = counts.shape[0], np.diff(counts.indptr)
    row, value, both = np.repeat(np.arange(n), sizes), counts.indices, counts.data
    rate = (both + fires[row] / max(1, total.sum())) / (total[value] + 1)
    order = np.lexsort((value, -rate, row))
    value, both = value[order], both[order]

    def running(x: np.ndarray) -> np.ndarray:  # sum within a row
        sums = np.concatenate(([0], np.cumsum(x)))
        return sums[1:] - np.repeat(sums[counts.indptr[:-1]], sizes)

    score, best = f1(running(both), running(total[value]), fires[row]), np.zeros(n)
    np.maximum.at(best, row, score)
    highest = np.flatnonzero(score == best[row])
    last = np.full(n, -1)
    last[row[highest][::-1]] = highest[::-1]  # the first of the highest
    kept = np.arange(len(row)) <= last[row]
    return sp.csr_matrix((both[kept], (row[kept], value[kept])), shape=counts.shape), best


def judge(chosen: sp.csr_matrix, counts: sp.csr_matrix, total: np.ndarray, fires: np.ndarray) -> np.ndarray:
    """The F1 of sets of values where they were not fitted, [n]."""
    inside = (chosen > 0).astype(np.int64)
    return f1(np.asarray(inside.multiply(counts).sum(1)).ravel(), inside @ total, fires)


def detect(halves, sizes: list[int], kept: list | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which rule the first half chooses for each subcomponent, its F1 there, and in the second half: [n] each.

    kept: gets the sets of values of each rule.
    """
    fitted, judged, n_fires = [], [], [np.asarray(fires.sum(1)).ravel() for _, fires in halves]
    for k, size in enumerate(sizes):
        tables = [(fires @ one_hot(values[k].ravel(), size)).tocsr() for values, fires in halves]
        totals = [np.bincount(values[k].ravel(), minlength=size) for values, _ in halves]
        chosen, score = fit(tables[0], totals[0], n_fires[0])
        fitted.append(score)
        judged.append(judge(chosen, tables[1], totals[1], n_fires[1]))
        if kept is not None:
            kept.append(chosen)
    fitted, judged = np.stack(fitted), np.stack(judged)
    rule = fitted.argmax(0)
    at = rule, np.arange(len(rule))
    return rule, fitted[at], judged[at]


def elsewhere(windows: int, T: int, rng: np.random.Generator) -> np.ndarray:
    """For every position of the windows another, [windows, T]: those of a window stay together, in turn."""
    return rng.permutation(windows)[:, None] * T + (rng.integers(T, size=(windows, 1)) + np.arange(T)) % T


def null(halves, sizes: list[int], rng: np.random.Generator) -> np.ndarray:
    """The judged F1, [n], where firings meet the values of elsewhere."""
    moved = []
    for values, fires in halves:
        at = elsewhere(*values[0].shape, rng)
        moved.append(([of.ravel()[at] for of in values], fires))
    return detect(moved, sizes)[2]


# ---------------------------------------------------------------------------------------------------------------------
# C. The run


@dataclass(frozen=True)
class Config:
    run: str  # run folder of decompose.py
    tokens: int = 65_536  # of validation text, at most all of it
    shuffles: int = 39  # of the null
    seed: int = 0  # of the windows and the null
    data_dir: str = ""  # where token files are kept; default as in the run
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...

    def __post_init__(self) -> None:
        require(self, "above 0", "tokens", "shuffles")
        require(self, "0 or above", "seed")
        if not 19 <= self.shuffles <= 10_000:
            raise UserError(f"shuffles={self.shuffles}: must be 19 to 10,000, for a quantile of {QUANTILE:g}")


def rules(positions: Positions, names: list[str], shuffles: int, seed: int) -> dict:
    """Numbers of rules.json: of all subcomponents, and of each by its name."""
    halves, kept, rng = [positions.half(0), positions.half(1)], [], np.random.default_rng(seed)
    rule, fitted, score = detect(halves, positions.sizes, kept)
    of_null = np.stack([null(halves, positions.sizes, rng) for _ in tqdm(range(shuffles), "rules: null", leave=False)])
    bar = np.quantile(of_null, QUANTILE, axis=0, method="higher")
    mean, explained, fires = of_null.mean(0), score > bar, [np.diff(fires.indptr) for _, fires in halves]
    subcomponents = {}
    for c, name in enumerate(names):
        row, called = kept[rule[c]][c], positions.names[rule[c]]
        values = [called[row.indices[i]] for i in np.argsort(-row.data, kind="stable")[:SHOWN]]
        subcomponents[name] = {
            "rule": RULES[rule[c]], "values": values, "n_values": int(row.nnz), "score": float(score[c]),
            "fitted": float(fitted[c]), "null_mean": float(mean[c]), "null_95": float(bar[c]),
            "explained": bool(explained[c]), "fires": [int(n[c]) for n in fires],
        }  # fmt: skip
    return {
        "live": len(names),
        "share_explained": float(explained.mean()),
        "mean_score": float(score.mean()),
        "mean_above_null": float((score - mean).mean()),
        "fire_too_rarely": int((np.minimum(*fires) < FEW).sum()),
        "subcomponents": subcomponents,
    }


def table(found: dict) -> str:
    """For a person: the share, then by rule and by matrix, then the ten that are explained best."""
    each = found["subcomponents"]

    def group(title: str, key) -> list[str]:
        lines, groups = [f"{title:20s} {'live':>6s} {'explained':>10s} {'F1':>7s} {'null F1':>8s}"], {}
        for name, of in each.items():
            groups.setdefault(key(name, of), []).append(of)
        for what in sorted(groups, key=RULES.index) if title == "by rule" else groups:
            of = groups[what]
            share, score, at_null = (sum(one[k] for one in of) / len(of) for k in ("explained", "score", "null_mean"))
            lines.append(f"{what:20s} {len(of):6,d} {share:10.1%} {score:7.3f} {at_null:8.3f}")
        return [*lines, ""]

    lines = group("by rule", lambda name, of: of["rule"]) + group("by matrix", lambda name, of: name.split(":")[0])
    lines.append(f"{'explained best':20s} {'F1':>7s} {'null 95 %':>10s} {'fires':>6s}  rule")
    best = sorted(each, key=lambda name: (each[name]["null_95"] - each[name]["score"], -sum(each[name]["fires"])))
    for name in best[:10]:
        of, more = each[name], each[name]["n_values"] - 4
        what = ", ".join(of["values"][:4]) + (f" and {more} more" if more > 0 else "")
        numbers = f"{of['score']:7.3f} {of['null_95']:10.3f} {sum(of['fires']):6,d}"
        lines.append(f"{name:20s} {numbers}  {of['rule']}: {what}")
    share, above = f"{found['share_explained']:.1%} of {found['live']:,} live subcomponents", found["mean_above_null"]
    lines += [
        "",
        f"explained by a simple rule: {share}; held-out F1 {found['mean_score']:.3f}, {above:.3f} above the null",
    ]
    if rare := found["fire_too_rarely"]:
        lines.append(f"{rare:,} of them fire fewer than {FEW} times in a half, and count with the others")
    return "\n".join(lines)


def main(config: Config) -> None:
    began, (run, corpus) = time.time(), evaluation.open_run(config.run, config.data_dir, config.device)
    live = live_columns(run, evaluated_importances(run, corpus)[0])
    windows = min(-(-config.tokens // run.config["T"]), len(corpus.tokens["val"]) // run.config["T"])
    if windows < 4:
        raise UserError(f"tokens={config.tokens}: {windows} windows of {run.config['T']} tokens: there must be 4")
    positions = look(run, corpus, live, config.tokens, config.seed)
    found = rules(positions, names_of(run, live), config.shuffles, config.seed)
    about = {"run_mark": run.mark, "tokens": int(positions.fires.shape[0]), "seed": config.seed, "score": "F1"}
    path = run.folder / "rules.json"
    write_text(path, json.dumps(about | {"shuffles": config.shuffles} | found, indent=2) + "\n")
    print(table(found))
    print(f"written: {path}, of {about['tokens']:,} tokens, {time.time() - began:.0f} s")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
