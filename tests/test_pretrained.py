"""Models of transformers as targets: small random ones of every family, saved in the test. No network.

What is exact is asked of the library's own model: its logits, and those of weights that are overwritten.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hub
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tiny import TINY, one_line
from tokenizers import decoders, models, pre_tokenizers, trainers

import checkpoints
import data
import decompose
import eval as evaluation
import losses
import pretrained
import studies.steer
import tokenise
from flags import UserError
from linears import largest_sides
from model import GPT, Decomposition, GPTConfig
from pretrained import Pretrained

CPU, END = torch.device("cpu"), "<|endoftext|>"
SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4)
SMALL |= dict(vocab_size=300, max_position_embeddings=32, bos_token_id=0, eos_token_id=0, pad_token_id=0)
TWO = dict(num_key_value_heads=2)  # keys and values that two heads share
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=300, n_embd=16, n_layer=3, n_head=4, n_inner=24, n_positions=32, bos_token_id=0, eos_token_id=0
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SMALL),
    "llama": lambda: transformers.LlamaConfig(**SMALL, **TWO),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL, **TWO),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, **TWO, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(
        **SMALL, **TWO, head_dim=8, query_pre_attn_scalar=8, sliding_window=4, final_logit_softcapping=2.0
    ),
    "phi": lambda: transformers.PhiConfig(**SMALL),
    "phi3": lambda: transformers.Phi3Config(**SMALL, **TWO),
}
FAMILIES = pytest.mark.parametrize("family", CONFIGS)


def random_model(family: str, std: float = 0.3) -> torch.nn.Module:
    """A model of the library, every weight and bias of which matters."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(std=std)
            if "norm" in name or ".ln_" in name:
                weight += 1
    return model


def some_tokens(B: int = 2, T: int = 12) -> torch.Tensor:
    return torch.randint(0, 300, (B, T), generator=torch.Generator().manual_seed(1))


def byte_level(texts: list[str], n: int) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer as GPT-2, GPT-NeoX, Llama 3 and Qwen have one."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=n, special_tokens=[END], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


@pytest.fixture(scope="module")
def tokenizer(session_home) -> transformers.PreTrainedTokenizerFast:
    return byte_level([path.read_text() for path in sorted((session_home / "text").iterdir())], 290)


@pytest.fixture(scope="module")
def folder(session_home, tokenizer):
    """folder(family): a saved model with its tokenizer, not to be changed."""

    def folder(family: str) -> Path:
        path = session_home / f"model-{family}"
        if not path.exists():
            random_model(family).save_pretrained(path)
            tokenizer.save_pretrained(path)
        return path

    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Conversion


@FAMILIES
@torch.no_grad()
def test_the_logits_are_those_of_the_library_and_every_matrix_has_a_name_of_ours(family):
    model, x = random_model(family), some_tokens()
    logits = model(x).logits
    ours = Pretrained(model)
    assert (ours(x) - logits).abs().max() < 1e-5 < 1 < logits.abs().max()
    names = [name for name, part in ours.named_modules() if isinstance(part, torch.nn.Linear)]
    of_mlp = {"up", "down"} | ({"gate"} if family in ("llama", "qwen2", "qwen3", "gemma2", "phi3") else set())
    parts = [f"attn.{name}" for name in "qkvo"] + [f"mlp.{name}" for name in of_mlp]
    assert sorted(names) == sorted(f"blocks.{i}.{part}" for i in range(3) for part in parts)
    assert pretrained.not_linear(ours) == []
    assert largest_sides(ours)["blocks.1.mlp.up"] == 24 and "unembedding" in dict(ours.named_parameters())


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3"])
def test_v_of_a_fused_matrix_is_the_v_of_the_librarys_attention(family):
    model, x = random_model(family), some_tokens(1, 4)
    seen = {}
    original = torch.nn.functional.scaled_dot_product_attention

    def record(q, k, v, *args, **kwargs):
        seen.setdefault("qkv", (q, k, v))
        return original(q, k, v, *args, **kwargs)

    ours = Pretrained(copy.deepcopy(model))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
        model(x)
        v = seen["qkv"][2]  # [1, H, T, d_head]; v is neither rotated nor repeated before
        inputs = []
        layer = ours.get_submodule("blocks.0.attn.v")
        layer.register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
        ours(x)
        own = layer(inputs[0]).unflatten(-1, (-1, 4)).transpose(1, 2)
    rows = own.shape[1]
    assert torch.allclose(own, v[:, :: v.shape[1] // rows], atol=1e-5)


@FAMILIES
@torch.no_grad()
def test_masks_are_overwritten_weights_and_all_ones_are_the_model(family):
    ours, x, generator = Pretrained(random_model(family)), some_tokens(), torch.Generator().manual_seed(2)
    f = Decomposition(ours, {"*": 3}, generator, "hidden")
    n = sum(f.C.values()) + f.L
    hidden, _ = f.target_pass(x)
    assert torch.allclose(f(x, torch.ones(1, 1, n)), hidden, atol=1e-5)
    m = torch.rand(n, generator=generator)
    masked = f(x, m[None, None])
    overwritten = copy.deepcopy(ours)
    *ms, m_Deltas = m.split([*f.C.values(), f.L])
    for name, m_c, m_Delta in zip(f.names, ms, m_Deltas):
        W = (f.U[name] * m_c) @ f.V[name].T + m_Delta * f.Delta(name)
        overwritten.get_submodule(name).weight.copy_(W)
    assert torch.allclose(masked, overwritten.hidden(x), atol=1e-4)
    assert (masked - hidden).abs().max() > 0.1


@FAMILIES
def test_the_chunked_divergence_has_the_bias_and_the_soft_cap(family):
    """Its value and gradient against the plain one, of the logits that the library would make."""
    ours, x = Pretrained(random_model(family)).double(), some_tokens()
    assert (ours.unembedding_bias is not None) == (family == "phi") and (ours.softcap or 0) == 2 * (family == "gemma2")
    with torch.no_grad():
        h_p = ours.hidden(x)
    grads, values = [], []
    chunked = losses.HiddenKL(ours.unembedding, 5, ours.unembedding_bias, ours.softcap)
    logits = lambda h: losses.logits_of(h, ours.unembedding, ours.unembedding_bias, ours.softcap)
    assert torch.allclose(logits(h_p), ours(x))
    for D in (chunked, lambda p, q: losses.kl_divergence(logits(p), logits(q))):
        h_q = (0.7 * h_p + 0.1).requires_grad_()
        values.append(D(h_p, h_q))
        grads.append(torch.autograd.grad(values[-1], h_q)[0])
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-5) and values[0] > 1e-3
    assert torch.allclose(*grads, atol=1e-6)


def vpd_of(target, C: str = "*=3", **changes) -> decompose.VPD:
    config = decompose.Config(**TINY | dict(T=12, C=C) | changes)
    f = Decomposition(target, decompose.parse_counts("C", C), torch.Generator().manual_seed(0), "hidden")
    torch.manual_seed(0)
    gamma = decompose.CITransformer([V.shape[0] for V in f.V.values()], sum(f.C.values()), 16, 1, 2, 16)
    divergence = losses.HiddenKL(target.unembedding, bias=target.unembedding_bias, softcap=target.softcap)
    return decompose.VPD(f, gamma, config, (2, 12), CPU, divergence)


@FAMILIES
def test_a_training_step(family):
    vpd = vpd_of(Pretrained(random_model(family)))
    before = [weight.detach().clone() for weight in vpd.learning]
    frozen = [weight.clone() for weight in vpd.decomposition.target.parameters()]
    row = vpd.train_step(some_tokens())
    assert all(value.isfinite() for value in row.values()) and row["adversarial"] > 0
    assert all(not torch.equal(a, b) for a, b in zip(before, vpd.learning))
    assert all(torch.equal(a, b) for a, b in zip(frozen, vpd.decomposition.target.parameters()))


# ---------------------------------------------------------------------------------------------------------------------
# The part before the first decomposed matrix


@pytest.mark.parametrize("family", ["ours", *CONFIGS])
def test_blocks_before_the_first_decomposed_one_run_once_a_step_and_change_no_bit(family, monkeypatch):
    if family == "ours":
        torch.manual_seed(0)
        target = GPT(GPTConfig(300, 32, n_layer=3, n_head=2, d_model=16, d_mlp=24))
    else:
        target = Pretrained(random_model(family))
    steps, calls = [], []
    target.blocks[0].register_forward_hook(lambda *_: calls.append(0))
    for start in (2, 0):
        vpd = vpd_of(target, "*.2.*=3", n_adv=3)
        assert vpd.decomposition.start == 2
        vpd.decomposition.start = start
        calls.clear()
        row = vpd.train_step(some_tokens())
        assert len(calls) == (1 if start else 1 + 3 + 1)  # target, two inner ascents and the shared one, random masks
        steps.append([*row.values(), *vpd.learning])
    assert all(torch.equal(a, b) for a, b in zip(*steps))


def test_start_is_the_first_block_with_a_decomposed_matrix(gpt):
    starts = {"*=2": 0, "blocks.1.mlp.*=2": 1, "*.1.attn.q=2,*.0.mlp.up=2": 0}
    for C, start in starts.items():
        assert Decomposition(gpt, decompose.parse_counts("C", C), None, "hidden").start == start
    assert Decomposition(gpt, {"blocks.1.*": 2}).start == 0  # of logits: tokens alone make them


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers

TEXT = "def café(x):\n\treturn '☃' + x  # <|endoftext|>\u00a0 ÿ\n"


def sentencepiece_like() -> tokenizers.Tokenizer:
    """A BPE with ▁ for a space and <0x..> for bytes it has no letter for, as Llama 2 and Gemma have one."""
    pieces = [END, *(f"<0x{b:02X}>" for b in range(256)), *"▁abcdefrtu", "re", "▁re"]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [("r", "e"), ("▁", "re")], byte_fallback=True)
    )
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([END])
    return tokenizer


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_the_bytes_of_tokens_are_those_of_the_text(kind, tokenizer):
    made = tokenizer.backend_tokenizer if kind == "byte level" else sentencepiece_like()
    encoding = tokenise.FastTokenizer(made.to_str(), 0, 310)
    ids = encoding.encode_ordinary(TEXT)
    assert b"".join(map(encoding.decode_single_token_bytes, ids)) == TEXT.encode() and encoding.decode(ids) == TEXT
    assert encoding.eot_token not in ids  # as it is in the text and not of our making
    assert encoding.decode_single_token_bytes(0) == END.encode()
    assert encoding.decode_single_token_bytes(309) == b"<309>" and encoding.n_vocab == 310  # of logits without a token
    (again,) = tokenise.encode(encoding, [TEXT])
    assert again == [*ids, 0]
    vocab = json.loads(json.dumps(tokenise.vocab_of(encoding)))
    assert tokenise.encoding_of(vocab, "x").name == encoding.name


def test_token_files_are_apart_for_each_tokenizer_and_wide_for_a_large_vocabulary(home, tokenizer, tmp_path):
    text = tokenizer.backend_tokenizer.to_str()
    small, large = (tokenise.FastTokenizer(text, 0, n) for n in (300, 70_000))
    corpora = [data.load("text", tmp_path / "data", own=own) for own in (small, large)] + [data.load("text")]
    assert [corpus.tokens["val"].dtype for corpus in corpora] == [np.uint16, np.uint32, np.uint16]
    assert len({corpus.folder.name for corpus in corpora}) == len({corpus.vocabulary for corpus in corpora}) == 3
    assert len({corpus.name for corpus in corpora}) == 1
    assert np.array_equal(corpora[0].tokens["train"], corpora[1].tokens["train"])
    assert data.open_tokens(corpora[1].folder).digest == corpora[1].digest != corpora[0].digest
    assert torch.equal(*(corpus.batch("train", 0, 2, 8) for corpus in corpora[:2]))
    assert corpora[1].vocab_size == 70_000


def test_ids_must_be_tokens_of_the_model(home, tokenizer, tmp_path):
    rows = "".join(json.dumps({"input_ids": [i, 299 + (i > 90)]}) + "\n" for i in range(100))
    (tmp_path / "ids.jsonl").write_text(rows)
    own = tokenise.FastTokenizer(tokenizer.backend_tokenizer.to_str(), 0, 300)
    with pytest.raises(UserError, match="has the token id 300: 0 to 299 can be stored"):
        data.load(str(tmp_path / "ids.jsonl"), tmp_path / "data", own=own)


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize("family", ["gpt_neox", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_from_a_folder_to_table_and_report_and_every_reader_opens_the_run(family, home, folder, monkeypatch, capsys):
    target, out = folder(family), f"of-{family}"
    settings = TINY | dict(steps=2, C="auto", report_tokens=64, eval_every=2)
    decompose.main(decompose.Config(dataset="text", target=str(target), out=out, **settings))
    printed = capsys.readouterr().out
    assert "18 matrices" in printed or "21 matrices" in printed
    assert "adversarial_80" in printed and (home / out / "report.html").is_file()
    checkpoint = checkpoints.load_checkpoint(home / out / "checkpoint.pt", "decomposition")
    assert checkpoint["C"]["blocks.0.mlp.up"] == 24 and checkpoint["C"]["blocks.0.attn.q"] >= 16
    shutil.move(target, gone := target.with_name("gone"))  # the run has all it needs
    try:
        opened, corpus = evaluation.open_run(out)
    finally:
        shutil.move(gone, target)
    assert json.loads((home / out / "metrics.json").read_text())["compute_recovered"] == {}
    x = some_tokens()
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(target)
        logits = opened.logits(opened.importances(x)[0])
    assert torch.allclose(logits, model(x).logits, atol=1e-4)
    assert one_line(studies.steer, out).endswith("knows the parts of targets of train_target.py only")
    assert corpus.encoding.name.startswith("fast-") and corpus.folder.name != data.load("text").folder.name


def test_a_large_model_is_named_and_not_stored_and_must_be_the_same_later(home, folder, tmp_path, monkeypatch):
    path = tmp_path / "model"
    shutil.copytree(folder("llama"), path)
    monkeypatch.setattr(pretrained, "SMALL", 0)
    checkpoint = pretrained.checkpoint(str(path), "float32", 16)
    assert checkpoint["model"] == {} and checkpoint["pretrained"]["target"] == str(path)
    x = some_tokens()
    assert torch.equal(pretrained.build(checkpoint)(x), Pretrained(random_model("llama"))(x))
    random_model("llama", std=0.31).save_pretrained(path)
    with pytest.raises(UserError, match="its weights are others than those of the run"):
        pretrained.build(checkpoint)


def test_bfloat16_is_of_the_target_alone(home, folder):
    settings = TINY | dict(steps=1, C="*.2.*=4", dtype="bfloat16", eval_every=1)
    out = decompose.train(decompose.Config(dataset="text", target=str(folder("qwen2")), out="of-bf16", **settings))
    opened = evaluation.load_run(out, CPU)
    W = random_model("qwen2").model.layers[2].mlp.up_proj.weight
    assert torch.equal(opened.decomposition.W("blocks.2.mlp.up"), W.bfloat16().float())
    assert {weight.dtype for weight in opened.decomposition.parameters()} == {torch.float32}


def test_auto_is_the_default_of_another_model_alone(home, folder):
    assert decompose.Config(target=str(folder("gpt2"))).defaults().C == "auto"
    assert decompose.Config(target="hf:gpt2", scale="tiny").defaults().C == "auto"
    assert decompose.Config(target="target").defaults().C == decompose.Config().C
    assert not pretrained.is_pretrained("target") and not pretrained.is_pretrained("")


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def changed(source: Path, to: Path, file: str, **values) -> str:
    """A copy of a model's folder with these values in one of its files; the path."""
    shutil.copytree(source, to)
    content = json.loads((to / file).read_text())
    (to / file).write_text(json.dumps({k: v for k, v in (content | values).items() if v is not None}))
    return str(to)


def test_what_cannot_be_a_target_is_refused_in_one_line(home, folder, tmp_path, monkeypatch):
    source, text = folder("gpt2"), ["--dataset=text", "--out=refused"]
    refused = lambda target, T=16: one_line(decompose, f"--target={target}", *text, f"--T={T}")
    bert = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    transformers.BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    assert "BertForMaskedLM is no causal language model" in refused(tmp_path / "bert")
    quantised = changed(source, tmp_path / "q", "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantised (gptq)" in refused(quantised)
    endless = changed(source, tmp_path / "e", "tokenizer_config.json", eos_token=None)
    assert "has no end-of-text token" in refused(endless)
    assert refused(source, 33) == f"error: T=33: the context of {source} is 32 tokens: give a smaller T"
    few = changed(source, tmp_path / "few", "config.json", vocab_size=200)
    assert "its tokenizer has the token 2" in refused(few)
    more = changed(source, tmp_path / "more", "config.json", n_layer=4)
    assert "its files lack 12 weights, as transformer.h.3" in refused(more)
    pickled = Path(changed(source, tmp_path / "p", "config.json"))
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    assert "its weights, in safetensors, cannot be read" in refused(pickled)
    remote = changed(source, tmp_path / "r", "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Mine"})
    assert "its config.json cannot be read" in refused(remote)
    bare = Path(changed(source, tmp_path / "b", "config.json"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    assert "its tokenizer makes no tokens of text" in refused(bare)
    assert "hf:owner/model: its config.json cannot be read from https://huggingface.co" in refused("hf:owner/model")
    assert "there is a folder 'text' here" in refused("hf:text") and "write hf:<id>" in refused("hf:")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "needs `pip install transformers`" in refused(source)
    assert not (home / "refused").exists()


def test_a_model_that_looks_ahead_or_says_more_than_its_unembedding_is_refused(monkeypatch):
    model = random_model("llama")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    model.config._attn_implementation = "sdpa"
    with pytest.raises(UserError, match="it is not causal"):
        pretrained.checked("x", model)
    model = random_model("llama")
    head = model.forward
    model.forward = lambda **inputs: transformers.modeling_outputs.CausalLMOutput(logits=2 * head(**inputs).logits)
    with pytest.raises(UserError, match="are not those of its last hidden state"):
        pretrained.checked("x", model)


def test_what_no_linear_applies_is_named():
    model = random_model("llama")
    model.model.layers[1].mlp.extra = torch.nn.Parameter(torch.ones(3, 3))
    assert pretrained.not_linear(Pretrained(model)) == ["1.mlp.extra"]


# ---------------------------------------------------------------------------------------------------------------------
# The hub, in a process of its own, as the library reads HF_ENDPOINT when it is imported

SCRIPT = """
import contextlib, http.server, io, json, os, sys, threading
from pathlib import Path
from hub import Hub
Hub.root = Path("hub")
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
import cost, decompose, eval, pretrained
cost.report, found = lambda *args: 0, {}
with contextlib.redirect_stdout(sys.stderr):
    config = decompose.Config(**json.loads(sys.argv[1]))
    folder = decompose.train(config)
    opened, corpus = eval.open_run(folder)
    saved = opened.checkpoint["target"]
    found["stored"], found["about"] = len(saved["model"]), dict(saved["pretrained"])
    found["up"] = opened.decomposition.W("blocks.2.mlp.up").sum().item()
    server.shutdown(), server.server_close()
    found["offline"] = eval.load_run(folder, opened.device).decomposition.W("blocks.2.mlp.up").sum().item()
    try:
        pretrained.read_config("hf:owner/unseen")
    except Exception as error:
        found["unseen"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_model_of_the_hub_is_decomposed_and_opened_again(session_home, folder, tmp_path):
    shutil.copytree(folder("qwen3"), tmp_path / "hub/owner/small")
    settings = TINY | dict(dataset=str(session_home / "text"), target="hf:owner/small", out="out", steps=1, C="*.2.*=3")
    tests, env = Path(__file__).parent, {n: v for n, v in os.environ.items() if not n.startswith("HF_")}
    env |= {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    command = [sys.executable, "-c", SCRIPT, json.dumps(settings)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["stored"] == 0 and found["about"]["target"] == "hf:owner/small"
    assert found["about"]["revision"] == hub.COMMIT and len(found["about"]["digest"]) == 16
    assert found["up"] == found["offline"] == random_model("qwen3").model.layers[2].mlp.up_proj.weight.sum().item()
    assert found["unseen"].startswith(
        "UserError: target=hf:owner/unseen: its config.json cannot be read from http://127"
    )
    assert "set HF_HOME" in found["unseen"] and "\n" not in found["unseen"]
