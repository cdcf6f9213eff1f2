"""A decomposition to send to somebody: a folder, or a repository of the Hugging Face hub, that opens like a run folder.

  decomposition.safetensors   `U.<matrix>` [d_out, C_l], `V.<matrix>` [d_in, C_l], `gamma.<...>`, `target.<...>`
                              and, of a targeted run, the tokens of its prompts, `prompts.<split>`
  config.json                 the format, the settings, C, what Gamma and the target are built from, the text's digest
  vocab.json                  the vocabulary, as beside token files (tokenise.py)
  README.md, metrics.json     the model card, and the numbers of eval.py

The text itself is not in it. What needs none of it works at once; a reader that needs it says in one line how to get
it. `python -m studies.export` writes such a folder.
"""

import hashlib
import json
from pathlib import Path

import tiktoken

import checkpoints
import run
import tokenise
from flags import UserError
from linears import key_of

FORMAT = 1  # of config.json; every later version of this code opens it (tests/format1)
WEIGHTS, CONFIG, VOCAB = "decomposition.safetensors", "config.json", "vocab.json"
FILES = (WEIGHTS, CONFIG, VOCAB, "README.md", "metrics.json")
HUB = "hf:"  # before the id of a decomposition on the hub, as before that of a dataset
# What a checkpoint holds beside tensors, and what of its target
KEPT = ("config", "C", "gamma", "step", "seconds", "tokens")
KEPT_OF_TARGET = ("config", "gpt", "curve", "seconds", "vocabulary")


def is_export(folder: Path) -> bool:
    """Whether the folder is one of `write`, and no run folder."""
    return (folder / WEIGHTS).exists() and not (folder / "checkpoint.pt").exists()


def write(folder: Path, checkpoint: dict, vocab: str, about: dict) -> None:
    """The weights, config.json and vocab.json of a decomposition, from a checkpoint of kind "decomposition".

    vocab: the text of vocab.json. about: what else config.json says. Paths of this machine are left out, but for a
    dataset that is one. UserError for a target that is not of train_target.py.
    """
    from safetensors.torch import save

    target = checkpoint["target"]
    if "gpt" not in target:
        raise UserError(f"{folder}: only a decomposition of a target of train_target.py can be exported")
    tensors = {f"gamma.{name}": value for name, value in checkpoint["ci_fn"].items()}
    tensors |= {f"target.{name}": value for name, value in target["model"].items()}
    tensors |= {f"prompts.{split}": tokens for split, tokens in checkpoint.get("prompts", {}).items()}
    for name in checkpoint["C"]:
        tensors |= {f"{letter}.{name}": checkpoint["decomposition"][f"{letter}:{key_of(name)}"] for letter in "UV"}
    content = {"format": FORMAT} | {name: checkpoint[name] for name in KEPT}
    content["target"] = {name: target[name] for name in KEPT_OF_TARGET}
    for part in (content, content["target"]):
        part["config"] = part["config"] | {"data_dir": "data", "out": "", "resume": ""}
    content["config"]["target"] = ""
    content["tokens_folder"] = Path(checkpoint["tokens_folder"]).name
    with run.written(folder / WEIGHTS) as temporary:
        temporary.write_bytes(save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}))
    run.write_text(folder / VOCAB, vocab)
    run.write_text(folder / CONFIG, json.dumps(content | about, indent=2) + "\n")


def read(folder: Path) -> dict:
    """The checkpoint that was written there. UserError if it is not whole, or of a newer format."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        found = content["format"]
        tensors = load_file(folder / WEIGHTS)
        vocabulary = hashlib.sha256((folder / VOCAB).read_bytes()).hexdigest()[:16]
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder} is not a whole export ({type(error).__name__}: {error})") from error
    if found != FORMAT:
        raise UserError(f"{folder} has format {found}, not {FORMAT}: it is of a newer version of this code: update it")
    with checkpoints.built_from(folder / CONFIG):
        of = {part: {} for part in ("gamma", "target", "U", "V", "prompts")}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            of[part][rest] = value
        content["target"]["model"], content["ci_fn"], content["decomposition"] = of["target"], of["gamma"], {}
        content |= {"prompts": of["prompts"]} if of["prompts"] else {}
        for letter in "UV":
            content["decomposition"] |= {f"{letter}:{key_of(name)}": value for name, value in of[letter].items()}
        if vocabulary != content["target"]["vocabulary"]:
            raise UserError(f"{VOCAB} is not the vocabulary that its target was trained with")
    return checkpoints.Saved(folder / CONFIG, content)


def encoding(folder: Path) -> tiktoken.Encoding:
    """The vocabulary of an export: text to ids and back, without the text that it was learnt from."""
    return tokenise.encoding_of(json.loads((folder / VOCAB).read_text(encoding="utf-8")), str(folder))


# ---------------------------------------------------------------------------------------------------------------------
# The hub


def located(folder: str | Path) -> Path:
    """A folder itself; for hf:<owner>/<name> the folder out/<owner>--<name>, fetched on first use.

    What readers write goes there too. UserError if it cannot be fetched; delete the folder to fetch it anew.
    """
    if not str(folder).startswith(HUB):
        return Path(folder)
    id = str(folder).removeprefix(HUB)
    home = Path("out") / id.replace("/", "--")
    if not all((home / name).is_file() for name in (WEIGHTS, CONFIG, VOCAB)):
        hub = imported()
        remedy = "check the id, set HF_ENDPOINT to a mirror, or give the path of a local copy"
        with tokenise.explained(f"{folder} cannot be fetched from {hub.constants.ENDPOINT}", remedy), run.claims():
            run.claim(home, beside=True, wait=True)  # another process may be fetching it
            hub.snapshot_download(id, local_dir=home, allow_patterns=list(FILES))
        if not is_export(home):
            raise UserError(f"{folder} is no exported decomposition: there is no {WEIGHTS}")
    return home


def push(folder: Path, id: str) -> str:
    """Upload an export to <owner>/<name> of the hub, which is made if it is not there; returns its address."""
    hub = imported()
    remedy = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
    with tokenise.explained(f"push={id}: cannot be uploaded to {hub.constants.ENDPOINT}", remedy):
        api = hub.HfApi()
        url = api.create_repo(id, exist_ok=True)
        api.upload_folder(repo_id=id, folder_path=folder, allow_patterns=list(FILES))
    return str(url)


def imported():
    """huggingface_hub. UserError if it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.constants
    except ImportError as error:
        raise UserError("huggingface_hub is not installed: pip install huggingface_hub") from error
    return huggingface_hub
