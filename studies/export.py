"""Make of a run a folder to send to somebody, and push it to the Hugging Face hub.

    python -m studies.export out/vpd-stdlib my-decomposition                      # seconds
    python -m studies.export out/vpd-stdlib my-decomposition --push=owner/name    # after `hf auth login`

Writes U, V, Gamma and the target as safetensors, config.json, the vocabulary, metrics.json and a model card. Every
reader opens the folder, or hf:owner/name, like a run: `python eval.py hf:owner/name`. share.py has the format.

  A. The model card
  B. The run

Left out: the text. The card says how whoever opens the folder gets it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import checkpoints
import run
import share
import tokenise
from eval import open_run, read_metrics
from flags import UserError
from run import run_script, write_text

# ---------------------------------------------------------------------------------------------------------------------
# A. The model card

CARD = """---
tags:
- interpretability
- parameter-decomposition
---

# {matrices} matrices of a language model as {C:,} rank-one subcomponents

A decomposition by VPD, adversarial parameter decomposition (*Interpreting Language Model Parameters*). The target is a
transformer of {n_layer} blocks and width {d_model}, trained on `{dataset}`. Each of its matrices is W = U Vᵀ + Δ. A
network Γ, which is here too, says how important each subcomponent is at each token.

| on {windows} validation windows of {T} tokens | |
|---|---|
{table}

Seed {seed}, n = 1. All numbers are in `metrics.json`, in nats a token. KL is KL(target ‖ masked).

## How to open it

With the code that wrote it (format {format}), in place of a run folder:

```sh
python eval.py {where}
python -m studies.report {where}
```

Or in Python, without the text:

```python
import torch, eval, share

run = eval.load_run("{where}", torch.device("cpu"))
encoding = share.encoding(run.folder)
hidden, g, inputs = run.importances(torch.tensor([encoding.encode_ordinary("{prompt}")]))
```

`g` holds the causal importances, [1, tokens, {C}]. Without any of this code, `decomposition.safetensors` holds
`U.<matrix>` [d_out, C] and `V.<matrix>` [d_in, C].

## Its text

The text is not in here. What reads it looks for token files with the digest `{tokens}`, in `{data_folder}`.
{text}

## How it was made

```sh
python {command}
```

commit `{commit}`, {hardware}, Python {python}, torch {torch}.
"""
STDLIB = """It is the source of Python's standard library. Python {python} makes it again by itself; another version has
another text."""
FROM_HUB = "It is made again by itself from the hub, where that can be reached."
LOCAL = "It was local text. Ask whoever made this for that folder."
PROMPT = "for i in range("


def table(metrics: dict) -> str:
    """The rows of the card: the numbers with which the README of the code begins."""
    ce, kl, n = metrics["ce"], metrics["kl"], metrics["adv_steps"][-1]
    rows = {
        "subcomponents that are needed at a token (L0)": f"{metrics['l0']['total']:.1f} of {metrics['live']['C']:,}",
        "subcomponents that are ever needed (live)": f"{metrics['live']['total']:,}",
        "CE of the target, and with the important subcomponents alone": f"{ce['target']:.3f}, {ce['rounded_0.0']:.3f}",
        "KL under random masks": f"{kl['stochastic']:.3f}",
        "KL when the unimportant ones are cut to zero": f"{kl['rounded_0.0']:.3f}",
        f"KL under the worst masks that an adversary met ({n} steps)": f"{kl[f'adversarial_{n}_largest']:.3f}",
        "KL when everything is cut to zero": f"{kl['zero']:.3f}",
    }
    return "\n".join(f"| {what} | {value} |" for what, value in rows.items())


def card(content: dict, metrics: dict, where: str) -> str:
    """README.md, from what config.json and metrics.json of the export hold; where: how a reader is told of it."""
    config, dataset = content["config"], content["config"]["dataset"]
    kind = STDLIB if dataset == "stdlib" else FROM_HUB if tokenise.hub_set(dataset) else LOCAL
    return CARD.format(
        matrices=len(content["C"]), C=sum(content["C"].values()), n_layer=content["target"]["gpt"]["n_layer"],
        d_model=content["target"]["gpt"]["d_model"], dataset=dataset, windows=metrics["windows"], T=config["T"],
        table=table(metrics), seed=config["seed"], format=content["format"], where=where, prompt=PROMPT,
        tokens=content["tokens"], data_folder=f"data/{content['tokens_folder']}",
        text=kind.format(python=content["versions"]["python"]), command=content["command"], commit=content["commit"],
        hardware=content["hardware"], python=content["versions"]["python"], torch=content["versions"]["torch"],
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# B. The run


@dataclass(frozen=True)
class Config:
    run: str  # run folder of decompose.py, evaluated
    out: str  # folder to write; a new one, or one that was exported before
    push: str = ""  # <owner>/<name> on the hub to upload it to
    data_dir: str = ""  # where token files are kept; default as in the run

    def __post_init__(self) -> None:
        owner, slash, name = self.push.partition("/")
        if self.push and not (owner and name and "/" not in name):
            raise UserError(f"push={self.push!r}: must be <owner>/<name>")


@run.claims()
def main(config: Config) -> None:
    opened, corpus = open_run(config.run, config.data_dir, "cpu")
    metrics = read_metrics(opened.folder, opened.mark)
    path = opened.folder / "config.json"
    with checkpoints.built_from(path):
        said = json.loads(path.read_text(encoding="utf-8"))
        about = {name: said[name] for name in ("command", "commit", "hardware", "versions")}
    about["run_mark"] = opened.mark
    about["text"] = {"name": corpus.name, "encoding": corpus.encoding.name, "vocab_size": corpus.vocab_size}
    folder = Path(config.out)
    if not share.is_export(folder):
        run.new_folder(config.out)
    share.write(folder, opened.checkpoint, (corpus.folder / share.VOCAB).read_text(), about)
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    content = json.loads((folder / share.CONFIG).read_text(encoding="utf-8"))
    write_text(folder / "README.md", card(content, metrics, share.HUB + config.push if config.push else folder.name))
    size = sum((folder / name).stat().st_size for name in share.FILES)
    print(f"written: {folder}, {size / 1e6:.1f} MB: send it, and `python eval.py {folder}` opens it")
    if config.push:
        print(f"pushed: {share.push(folder, config.push)}: `python eval.py {share.HUB}{config.push}` opens it")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
