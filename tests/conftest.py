"""What the tests share: a tiny target f(x | W), a batch, its decomposition; one tiny corpus, target and run for all."""

import contextlib
import fcntl
import os
import shutil
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before `datasets` is imported: no test may use the network
os.environ.setdefault("TQDM_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
from tiny import TINY_TARGET, config

import cost
import decompose
import run
import tokenise
import train_target
from model import GPT, Decomposition, GPTConfig

torch.set_num_threads(1)


@pytest.fixture
def gpt():
    """A GPT whose weights are far larger than at initialisation, so that every matrix matters to the logits."""
    generator = torch.Generator().manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50, context=8, n_layer=2, n_head=2, d_model=16, d_mlp=32))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.4, generator=generator)
    return model


@pytest.fixture
def tokens():
    """[B, T] = [3, 8], every id below 49: token 49 never occurs."""
    return torch.randint(0, 49, (3, 8), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def decomposition(gpt):
    """All L = 12 matrices, C = 2 * (3 + 4 + 4 + 4 + 7 + 4) = 52."""
    return Decomposition(gpt, {"*.q": 3, "*.up": 7, "*": 4}, torch.Generator().manual_seed(2))


@pytest.fixture(scope="session")
def session_home(tmp_path_factory) -> Path:
    """A folder with a small corpus `text` and a tiny target `target` trained on it."""
    home = tmp_path_factory.mktemp("run")
    (home / "text").mkdir()
    for name in ("random.py", "shutil.py", "tempfile.py", "typing.py", "zipfile/__init__.py"):
        source = tokenise.stdlib_folder() / name
        if source.exists():
            (home / "text" / (source.stem + str(len(name)) + ".txt")).write_text(source.read_text())
    before = os.getcwd()
    os.chdir(home)
    train_target.main(train_target.Config(dataset="text", out="target", **TINY_TARGET))
    os.chdir(before)
    return home


@pytest.fixture
def home(session_home, monkeypatch) -> Path:
    """The same, as the working directory. Runs made in it stay for the session: give them names of their own."""
    monkeypatch.chdir(session_home)
    return session_home


@pytest.fixture(scope="session")
def session_whole(session_home) -> Path:
    before = os.getcwd()
    os.chdir(session_home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "report", lambda *args: 0)
        decompose.main(config(out="whole", report_tokens=64, eval_every=4))
    os.chdir(before)
    return session_home / "whole"


@pytest.fixture
def whole(home, session_whole) -> Path:
    """A finished run of decompose.py, with its report: not to be changed, copy it."""
    return session_whole


@pytest.fixture
def held():
    """held(folder): inside, another process has claimed the folder."""

    @contextlib.contextmanager
    def held(folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / run.LOCK, "w") as lock:  # the system tells open files apart, not processes
            lock.write("process 1 on moon")
            lock.flush()
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        (folder / run.LOCK).unlink(missing_ok=True)

    return held


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium that logs its console and every request; skipped where there is none."""
    missing = "selenium is not installed: pip install -r requirements-dev.txt"
    webdriver = pytest.importorskip("selenium.webdriver", reason=missing)
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("no Chromium with its driver here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    flags = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
    flags += ["disable-component-update", "disable-sync", "window-size=1200,900"]
    for flag in [*flags, f"user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument("--" + flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


@pytest.fixture(autouse=True)
def nothing_stays_claimed():
    with run.claims():
        yield


@pytest.fixture(autouse=True)
def no_count(request, monkeypatch):
    """The count of what a run costs takes longer than a tiny run: left out but where it is marked `count`."""
    if "count" not in request.keywords:
        monkeypatch.setattr(cost, "report", lambda *args: 0)


@pytest.fixture
def as_a_file(monkeypatch):
    """As in `python /some/where/tried.py`, and not in `python -m pytest`."""
    monkeypatch.setattr(sys, "argv", ["/some/where/tried.py"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None, raising=False)
