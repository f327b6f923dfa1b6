"""Gates on the Hub: the real client against a server on the loopback, with every mishap a person may meet."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from learnevict import Gates
from learnevict.errors import GateError, UsageError
from learnevict.hub import GATES_FOLDER, Address, locate, weight_hash
from learnevict.hub.card import MARK
from tests.hub_client import Client
from tests.hub_server import Hub
from tests.laws import zoo
from tests.laws.cases import LEARNED, random_gates

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
SENT = {"config.json", "model.safetensors", "README.md"}
NEVER_SENT = ("training_args.bin", "optimizer.pt", "rng_state.pth", "notes.txt", "trainer_state.json")


def save(folder: Path, method: str = "foresightkv", model: str = "llama", change: float = 0.0) -> Path:
    """Random gates in a folder, with what a training leaves beside them."""
    random_gates(method, model).save_pretrained(folder)
    if change:
        gates = Gates.load(folder)
        with torch.no_grad():
            for weights in gates.parameters():
                weights.add_(change)
        gates.save_pretrained(folder)
    (folder / "run.json").write_text('{"log": []}')
    for name in NEVER_SENT:
        (folder / name).write_bytes(b"\x80\x04 not for others")
    return folder


def same(one: Path, other: Path) -> None:
    """Tensors and config, bit for bit."""
    assert (one / "config.json").read_bytes() == (other / "config.json").read_bytes()
    have, want = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert set(have) == set(want)
    assert all(torch.equal(have[name], want[name]) and have[name].dtype == want[name].dtype for name in want)


def is_told(answer: tuple[int, str, str], code: int, *remedies: str) -> None:
    """One line on standard error, and nothing else."""
    assert answer[0] == code, answer
    assert answer[1] == ""
    assert len(answer[2].splitlines()) == 1, answer[2]
    assert all(remedy in answer[2] for remedy in ("error: ", *remedies)), answer[2]


# --- there and back ---


@pytest.mark.slow
@pytest.mark.parametrize("method", ["foresightkv", "clausal"])
def test_what_is_pushed_comes_back_bit_for_bit(hub, client, tmp_path, method):
    folder, before = save(tmp_path / "gates", method), len(hub.requests)
    code, url, err = client("push", folder, f"me/{method}")
    assert code == 0, err
    assert "a new repository" in err
    assert url.strip().startswith(f"{hub.url}/me/{method}/commit/")
    assert set(hub.files(f"me/{method}")) == {*SENT, "run.json", ".gitattributes"}
    assert [path for verb, path in hub.requests[before:] if verb == "PUT"]
    code, out, err = client("pull", f"me/{method}", "--out", tmp_path / "back")
    assert (code, out.strip()) == (0, str(tmp_path / "back")), err
    same(folder, tmp_path / "back")
    assert {path.name for path in (tmp_path / "back").iterdir()} == {*SENT, "run.json", "origin.json"}
    assert Gates.load(tmp_path / "back", zoo.build("llama")).method == method


def test_a_folder_is_only_read(client, tmp_path):
    folder = save(tmp_path / "gates")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert client("push", folder, "me/only-read")[0] == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_transformers_loads_them_by_name(client, tmp_path):
    folder = save(tmp_path / "gates")
    client("push", folder, "me/auto")
    code = (
        "import learnevict.hub, torch\nfrom safetensors.torch import load_file\n"
        "from transformers import AutoConfig, AutoModel\nfrom learnevict import Gates\n"
        "want = load_file(folder + '/model.safetensors')\n"
        "found = [AutoModel.from_pretrained('me/auto'), Gates.from_pretrained('me/auto'), Gates.load('me/auto')]\n"
        "same = [all(torch.equal(one.state_dict()[name], want[name]) for name in want) for one in found]\n"
        "result = [AutoConfig.from_pretrained('me/auto').method, [type(one).__name__ for one in found], same]"
    )
    assert client.run(code, folder=str(folder)) == ["foresightkv", ["Gates"] * 3, [True] * 3]


def test_an_old_commit_gives_the_old_weights(hub, client, tmp_path):
    first, second = save(tmp_path / "first"), save(tmp_path / "second", change=0.5)
    client("push", first, "me/pinned")
    pinned = hub.repositories["me/pinned"].branches["main"]
    code, _, err = client("push", second, "me/pinned", "--message", "better ones")
    assert (code, "a new commit of a repository that exists" in err) == (0, True)
    assert hub.repositories["me/pinned"].messages == ["initial commit", "foresightkv gates for llama", "better ones"]
    code = (
        "from learnevict import Gates\n"
        "found = [Gates.from_pretrained('me/pinned', revision=commit), Gates.load('me/pinned', revision=commit),\n"
        "         Gates.load('me/pinned@' + commit), Gates.load('me/pinned')]\n"
        "result = [float(sum(weights.double().sum() for weights in one.state_dict().values())) for one in found]"
    )
    *old, new = client.run(code, commit=pinned)
    sums = [float(sum(t.double().sum() for t in load_file(f / "model.safetensors").values())) for f in (first, second)]
    assert (old, new) == ([sums[0]] * 3, sums[1])
    assert client("pull", "me/pinned", "--revision", pinned, "--out", tmp_path / "old")[0] == 0
    same(first, tmp_path / "old")
    assert client("pull", f"me/pinned@{pinned}", "--out", tmp_path / "old")[2].startswith("nothing new")
    assert client("pull", "me/pinned", "--out", tmp_path / "old")[0] == 0
    same(second, tmp_path / "old")


def test_a_branch(hub, client, tmp_path):
    client("push", save(tmp_path / "main"), "me/branches")
    folder = save(tmp_path / "other", change=0.5)
    assert client("push", folder, "me/branches", "--revision", "try")[0] == 0
    assert client("pull", "me/branches@try", "--out", tmp_path / "back")[0] == 0
    same(folder, tmp_path / "back")
    assert hub.files("me/branches")["model.safetensors"] != hub.files("me/branches", "try")["model.safetensors"]
    is_told(client("pull", "me/branches@none"), 1, "no branch, tag or commit 'none'")
    is_told(client("push", folder, "me/branches", "--revision", "0" * 40), 2, "give a branch")


def test_an_address_names_its_branch(hub, client, tmp_path):
    """As one reads gates, so one writes them."""
    client("push", save(tmp_path / "main"), "me/named")
    main = hub.repositories["me/named"].branches["main"]
    folder = save(tmp_path / "other", change=0.5)
    assert "in me/named@v2: a new commit" in client("push", folder, "me/named@v2")[2]
    assert client("push", folder, "named@v3", "--revision", "v3")[0] == 0
    assert hub.repositories["me/named"].branches["main"] == main
    weights = [hub.files("me/named", branch)["model.safetensors"] for branch in ("v2", "v3")]
    assert weights == [(folder / "model.safetensors").read_bytes()] * 2
    assert 'Gates.load("me/named@v2"' in hub.files("me/named", "v2")["README.md"].decode()
    is_told(client("push", folder, "me/named@v2", "--revision", "v3"), 2, "give one revision")
    is_told(client("push", folder, f"me/named@{'0' * 40}"), 2, "give a branch")
    is_told(client("push", folder, "me/named@"), 2, "give one revision")
    code = "from learnevict.hub import open_repository\nresult = open_repository('named@v2')"
    assert client.run(code) == "me/named@v2", "where a trainer will push to"


def test_no_folder_of_this_machine_is_sent(hub, client, tmp_path):
    folder, owner = save(tmp_path / "gates"), "/users/of/somebody"
    config = {"model": f"{owner}/base", "data": f"{owner}/chats.jsonl", "documents": 9, "start_from": "runs/scorer"}
    record = {
        "config": config, "training": {"output_dir": str(tmp_path), "logging_dir": "~/logs"}, "base_name": "user/base",
        "error": f"ValueError: cannot read '{owner}/a b.txt', nor {owner}/b", "before": {"config": config},
    }  # fmt: skip
    kept = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(kept | {"training": record, "base_name": f"{owner}/base"}))
    (folder / "run.json").write_text(json.dumps(record))
    assert client("push", folder, "me/private-folders")[0] == 0
    sent = hub.files("me/private-folders")
    told = {name: sent[name].decode() for name in ("config.json", "run.json", "README.md")}
    for name, text in told.items():
        assert not any(word in text for word in ("somebody", str(tmp_path), "~", '"/', "'/")), (name, text)
    run = json.loads(told["run.json"])
    assert run["config"] == {"model": "base", "data": "chats.jsonl", "documents": 9, "start_from": "runs/scorer"}
    assert (run["error"], run["training"]["logging_dir"]) == ("ValueError: cannot read 'a b.txt', nor b", "logs")
    assert json.loads(told["config.json"]) == kept | {"training": run, "base_name": "base"}
    assert "Trained on at most 9 documents of `chats.jsonl`" in told["README.md"]
    assert json.loads((folder / "run.json").read_text()) == record, "what lies here keeps them"
    (folder / "run.json").write_text("{")
    is_told(client("push", folder, "me/private-folders"), 1, "run.json", "as JSON", "write it anew, or remove it")


def test_gates_of_the_hub_name_no_module(hub, client, tmp_path):
    """Whoever may write to a repository cannot choose what runs here, in whichever folder one works."""
    client("push", save(tmp_path / "gates"), "me/evil")
    here = Path(client.run("import os\nresult = os.getcwd()"))
    (here / "deploy.py").write_text(
        "from pathlib import Path\nPath('ran').touch()\nfrom learnevict.methods.foresightkv import *\n"
    )
    files = hub.files("me/evil")
    config = json.dumps(json.loads(files["config.json"]) | {"method": "deploy"}).encode()
    hub.repositories["me/evil"].commit("main", files | {"config.json": config}, "innocent")
    for words in (("infer", "--task", "recall", "--budget", 48, "--ckpt", "me/evil"), ("pull", "me/evil")):
        is_told(client(*words), 1, "'deploy', which is no method of learnevict", "name it yourself")
    code = "from learnevict import Gates\nresult = Gates.from_pretrained('me/evil')"
    with pytest.raises(AssertionError, match=r"GateError.*no module is imported because gates name it"):
        client.run(code)
    assert not (here / "ran").exists()
    assert not (here / "evil").exists()


def test_pickles_are_not_fetched(hub, client, tmp_path):
    client("push", save(tmp_path / "gates"), "me/pickles")
    files = hub.files("me/pickles")
    files = {"config.json": files["config.json"], "pytorch_model.bin": files["model.safetensors"]}
    hub.repositories["me/pickles"].commit("main", files, "pickles")
    before = len(hub.requests)
    for call in ("Gates.from_pretrained", "Gates.load", "AutoModel.from_pretrained"):
        code = f"from learnevict import Gates\nfrom transformers import AutoModel\nresult = {call}('me/pickles')"
        with pytest.raises(AssertionError, match=r"GateError.*does not hold gates: there is no model\.safetensors"):
            client.run(code)
    assert not any(path.endswith(".bin") for _, path in hub.requests[before:])


def test_gates_from_the_hub_govern_a_cache(client):
    assert client("push", "testbed-foresightkv", "me/testbed")[0] == 0
    words = ("infer", "--task", "recall", "--budget", 48, "-n", 8, "--json", "--ckpt")
    answers = [
        json.loads(client(*words, where)[1]) for where in ("me/testbed", "me/testbed@main", "testbed-foresightkv")
    ]
    assert len({answer["text"] for answer in answers}) == 1
    assert {answer["method"] for answer in answers} == {"foresightkv"}


def test_gates_push_themselves(hub, client, tmp_path):
    code = (
        "from learnevict import Gates\nGates.load(folder).push_to_hub('mine', private=True, commit_message='mine')\n"
        "result = None"
    )
    client.run(code, folder=str(save(tmp_path / "gates")))
    assert set(hub.files("me/mine")) == {*SENT, ".gitattributes"}
    assert hub.repositories["me/mine"].private
    assert hub.repositories["me/mine"].messages[-1] == "mine"
    with pytest.raises(UsageError, match="call push_to_hub"):
        random_gates("foresightkv", "llama").save_pretrained(tmp_path / "again", push_to_hub=True)


TRAINING = """
import warnings
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
from learnevict import Gates
from learnevict.train.trainer import GateTrainer

warnings.simplefilter("ignore")
base = LlamaForCausalLM(LlamaConfig(
    vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))

class Shrinking(GateTrainer):
    def batch_loss(self, model, inputs, draws):
        return model(lambda gate: sum(weights.square().sum() for weights in gate.parameters()))

arguments = TrainingArguments(folder, max_steps=4, save_steps=2, push_to_hub=True, hub_model_id=name, report_to=[],
                              remove_unused_columns=False, use_cpu=True, hub_strategy=strategy, disable_tqdm=True,
                              logging_steps=1000)
trainer = Shrinking(model=Gates.make("foresightkv", base), args=arguments, base=base, train_dataset=[0] * 8,
                    data_collator=lambda rows: {"input_ids": torch.ones(1, 1)})
trainer.train()
trainer.save_model(folder)
Path(folder, "run.json").write_text("{}")
trainer.push_to_hub()
trainer.create_model_card()
result = sorted(path.name for path in Path(folder).iterdir())
"""


@pytest.mark.slow
def test_a_trainer_shares_the_same_and_no_pickles(hub, client, tmp_path):
    here = client.run(TRAINING, folder=str(tmp_path / "run"), name="me/trained", strategy="every_save")
    repository = hub.repositories["me/trained"]
    steps = [f"Training in progress, step {step}" for step in (2, 4)]
    assert repository.messages == ["initial commit", *steps, "End of training"], "saving again changed nothing"
    assert {name for files in repository.commits.values() for name in files} == {*SENT, "run.json", ".gitattributes"}
    assert MARK.encode() in hub.files("me/trained")["README.md"]
    assert MARK in (tmp_path / "run" / "README.md").read_text()
    assert "training_args.bin" not in here
    with pytest.raises(AssertionError, match="optimizer states are pickles"):
        client.run(TRAINING, folder=str(tmp_path / "other"), name="me/other", strategy="checkpoint")
    hub.fail("POST", "me/flaky/preupload", "status", status=403)
    client.run(TRAINING, folder=str(tmp_path / "flaky"), name="me/flaky", strategy="every_save")
    assert hub.repositories["me/flaky"].messages == ["initial commit", steps[1], "End of training"], "training went on"


# --- who may ---


def test_a_private_repository(hub, client, tmp_path):
    folder = save(tmp_path / "gates")
    assert client("push", folder, "me/secret", "--private")[0] == 0
    assert hub.repositories["me/secret"].private
    for token in (None, "hf_reader"):
        is_told(client("pull", "me/secret", token=token), 1, "does not exist, or is private", "hf auth login")
        words = ("infer", "--task", "recall", "--budget", 48, "--ckpt", "me/secret")
        is_told(client(*words, token=token), 1, "does not exist, or is private", "hf auth login")
    assert client("pull", "me/secret", "--out", tmp_path / "back")[0] == 0
    client("push", folder, "me/open")
    is_told(client("push", folder, "me/open", "--private"), 2, "exists already and is public", "nothing was sent")


def test_tokens(hub, client, tmp_path):
    folder = save(tmp_path / "gates")
    client("push", folder, "me/guarded")
    state = hub.files("me/guarded")
    changed = save(tmp_path / "changed", change=1.0)
    is_told(client("push", changed, "me/guarded", token=None), 1, "nobody is logged in", "hf auth login", "HF_TOKEN")
    is_told(client("push", changed, "me/guarded", token="hf_wrong"), 1, "does not accept the token", "hf auth login")
    is_told(
        client("push", changed, "me/guarded", token="hf_reader"),
        1,
        "may not write to me/guarded",
        "a token that may write",
    )
    is_told(client("push", changed, "you/new", token="hf_reader"), 1, "may not write to you/new")
    assert "you/new" not in hub.repositories
    assert hub.files("me/guarded") == state


# --- mishaps ---


def test_the_same_again_is_nothing_new(hub, client, tmp_path):
    folder = save(tmp_path / "gates")
    client("push", folder, "me/again")
    commits = len(hub.repositories["me/again"].commits)
    code, url, err = client("push", folder, "me/again")
    assert (code, "nothing was committed" in err) == (0, True)
    assert url.strip().endswith(hub.repositories["me/again"].branches["main"])
    assert len(hub.repositories["me/again"].commits) == commits


def test_what_is_gone_here_goes_there(hub, client, tmp_path):
    folder = save(tmp_path / "gates")
    client("push", folder, "me/stale")
    client("pull", "me/stale", "--out", tmp_path / "back")
    (folder / "run.json").unlink()
    assert client("push", folder, "me/stale")[0] == 0
    assert set(hub.files("me/stale")) == {*SENT, ".gitattributes"}
    assert client("pull", "me/stale", "--out", tmp_path / "back")[0] == 0
    assert not (tmp_path / "back" / "run.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "repos/create"), ("GET", "revision/main"), ("POST", "/commit/"), ("PUT", "/large/")],
)
def test_a_failure_in_passing_is_passed_over(hub, client, tmp_path, method, path):
    folder, name = save(tmp_path / "gates", change=len(path) / 7), f"me/passing-{method}-{len(path)}"
    hub.fail(method, path, "drop" if method == "PUT" else "status", status=500)
    code, _, err = client("push", folder, name)
    assert (code, hub.mishaps[-1].times) == (0, 0), err
    if method == "PUT":
        hub.fail("GET", "resolve/.*safetensors", "drop")
    assert client("pull", name, "--out", tmp_path / "back")[0] == 0
    assert hub.mishaps[-1].times == 0
    same(folder, tmp_path / "back")


def test_an_answer_that_was_lost(hub, client, tmp_path):
    """The commit was made, but nobody was told: the same command finds it and makes no second one."""
    folder = save(tmp_path / "gates")
    hub.fail("POST", "/commit/", "lose")
    is_told(client("push", folder, "me/lost"), 1, "broke off", "give the same command again")
    made = hub.repositories["me/lost"].branches["main"]
    code, url, err = client("push", folder, "me/lost")
    assert (code, "nothing was committed" in err) == (0, True)
    assert url.strip().endswith(made)
    assert len(hub.repositories["me/lost"].commits) == 2


def test_without_a_network_one_is_told_soon(hub, client, tmp_path):
    folder = save(tmp_path / "gates")
    client("push", folder, "me/far")
    client("pull", "me/far", "--out", tmp_path / "back")
    words = ("infer", "--task", "recall", "--budget", 48, "-n", 4, "--ckpt")
    hub.down()
    try:
        start = time.monotonic()
        is_told(client("push", folder, "me/far"), 1, "cannot be reached", "check the network")
        is_told(client("pull", "me/never", "--out", tmp_path / "never"), 1, "cannot be reached", "check the network")
        is_told(client(*words, "me/never"), 1, "cannot be reached", "check the network")
        assert time.monotonic() - start < 10
        code, _, err = client("pull", "me/far", "--out", tmp_path / "cached")
        assert code == 0, err
        assert "warning: the Hub cannot be reached; me/far comes from the local cache, as of commit" in err
        same(folder, tmp_path / "cached")
    finally:
        hub.up()


def checked(hub: Hub, client: Client, folder: Path, name: str, target: Path) -> None:
    """The same command again ends as if nothing had happened."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    code, _, err = client("push", folder, name)
    assert code == 0, err
    assert client("push", folder, f"{name}-undisturbed")[0] == 0
    found, want = hub.files(name), hub.files(f"{name}-undisturbed")
    assert {file: found[file] for file in found if file != "README.md"} == {
        file: want[file] for file in want if file != "README.md"
    }
    assert found["README.md"].decode() == want["README.md"].decode().replace(f"{name}-undisturbed", name)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert client("pull", name, "--out", target)[0] == 0
    same(folder, target)


@pytest.mark.slow
def test_a_connection_that_is_lost_for_good(hub, client, tmp_path):
    """The client itself tries six times; then the person is told, and the same command ends what it began."""
    folder = save(tmp_path / "gates", change=3.0)
    hub.fail("PUT", "/large/", "drop", times=100)
    is_told(client("push", folder, "me/cut"), 1, "broke off", "give the same command again")
    hub.mishaps.clear()
    assert set(hub.files("me/cut")) == {".gitattributes"}, "nothing half-written is visible"
    checked(hub, client, folder, "me/cut", tmp_path / "back")


@pytest.mark.slow
def test_a_pull_that_broke_off(hub, client, tmp_path):
    folder = save(tmp_path / "gates", change=2.5)
    client("push", folder, "me/broken")
    hub.fail("GET", "resolve/.*safetensors", "drop", times=100)
    is_told(client("pull", "me/broken", "--out", tmp_path / "back"), 1, "broke off", "give the same command again")
    assert not (tmp_path / "back").exists()
    hub.mishaps.clear()
    assert client("pull", "me/broken", "--out", tmp_path / "back")[0] == 0
    same(folder, tmp_path / "back")


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path"), [("PUT", "/large/"), ("POST", "/commit/")])
def test_a_process_that_was_killed(hub, client, tmp_path, method, path):
    """kill -9 while the weights go up, and while the commit is sent."""
    folder = save(tmp_path / "gates", change=4.0 + len(path))
    hub.held.clear()
    hub.fail(method, path, "hold")
    doomed = Client(hub, tmp_path / "doomed")
    name = f"me/killed-{method}"
    doomed.send({"words": ["push", str(folder), name], "environment": {"HF_TOKEN": "hf_owner"}})
    assert hub.held.wait(120)
    doomed.process.send_signal(signal.SIGKILL)
    doomed.process.communicate()
    assert set(hub.files(name)) == {".gitattributes"}, "nothing half-written is visible"
    stored = len(hub.large)
    checked(hub, client, folder, name, tmp_path / "back")
    assert len(hub.large) == stored + (method == "PUT"), "what had arrived was not sent twice"


@pytest.mark.slow
@pytest.mark.parametrize("method", LEARNED)
def test_every_learned_method_goes_there_and_back(client, tmp_path, method):
    folder = save(tmp_path / "gates", method, "qwen3")
    name = f"me/every-{method.replace('_', '-')}"
    assert client("push", folder, name)[0] == 0
    assert client("pull", name, "--out", tmp_path / "back")[0] == 0
    same(folder, tmp_path / "back")
    state = Gates.load(tmp_path / "back", zoo.build("qwen3")).state_dict()
    want = random_gates(method, "qwen3").state_dict()
    assert all(torch.equal(state[name], tensor.cpu()) for name, tensor in want.items())


# --- what is refused ---


def test_what_holds_no_gates_is_not_pushed(hub, client, tmp_path):
    model, weightless, cut, large = (tmp_path / name for name in ("model", "weightless", "cut", "large"))
    zoo.build("llama").save_pretrained(model)
    is_told(client("push", model, "me/no"), 1, "a model of type 'llama'")
    (save(weightless) / "model.safetensors").unlink()
    is_told(client("push", weightless, "me/no"), 1, "no model.safetensors")
    weights = save(cut) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    is_told(client("push", cut, "me/no"), 1, "damaged or cut short")
    with (save(large) / "run.json").open("wb") as file:
        file.truncate(11 * 2**20)
    is_told(client("push", large, "me/no"), 1, "run.json", "gates at most")
    is_told(client("push", "./nowhere", "me/no"), 1, "config.json and model.safetensors")
    is_told(client("push", "nowhere", "me/no"), 1, "testbed-foresightkv")
    is_told(client("push", save(tmp_path / "fine"), "me/no/where"), 2, "write user/repo")
    assert "me/no" not in hub.repositories


def test_what_holds_no_gates_is_not_pulled(hub, client, tmp_path):
    client("push", save(tmp_path / "gates"), "me/not")
    hub.repositories["me/not"].commit(
        "main", {"config.json": b'{"model_type": "qwen3"}', "model.safetensors": b"x"}, "a model"
    )
    before = len(hub.requests)
    is_told(client("pull", "me/not", "--out", tmp_path / "back"), 1, "not hold gates but a model of type 'qwen3'")
    assert not any("safetensors" in path for _, path in hub.requests[before:]), "a large file was fetched for nothing"
    hub.repositories["me/not"].commit("main", {"notes.md": b"-"}, "no model")
    is_told(client("pull", "me/not", "--out", tmp_path / "back"), 1, "no config.json and no model.safetensors")
    is_told(client("pull", "nothing"), 2, "write user/repo")
    assert not (tmp_path / "back").exists()


def test_nothing_of_the_users_is_overwritten(client, tmp_path):
    client("push", save(tmp_path / "gates"), "me/one")
    client("push", save(tmp_path / "more", change=0.5), "me/two")
    mine = tmp_path / "mine"
    mine.mkdir()
    assert client("pull", "me/one", "--out", mine)[0] == 0, "an empty folder will do"
    is_told(client("pull", "me/two", "--out", mine), 1, "holds gates of me/one", "choose another --out")
    (mine / "README.md").write_text("my notes")
    is_told(client("pull", "me/one", "--out", mine), 1, "README.md in", "changed since", "choose another --out")
    assert (mine / "README.md").read_text() == "my notes"
    (mine / "README.md").unlink()
    (mine / "model.safetensors").unlink()
    assert client("pull", "me/one", "--out", mine)[2].startswith("model.safetensors, README.md from me/one")
    same(tmp_path / "gates", mine)
    is_told(client("pull", "me/one", "--out", tmp_path / "more"), 1, "holds something else", "choose another --out")
    is_told(client("pull", "me/one", "--out", tmp_path / "gates" / "config.json"), 1, "choose another --out")


def test_weights_that_do_not_fit_their_config(tmp_path):
    """transformers would fill gaps with random numbers."""
    folder = save(tmp_path / "gates")
    other = save(tmp_path / "other", "clausal")
    shutil.copy(other / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(GateError, match=r"not those of a foresightkv gate \(missing_keys: .*unexpected_keys"):
        Gates.load(folder)


def test_where_gates_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate("me/gates@v1") == Address("me/gates", "v1")
    assert locate("me/gates", "v1") == locate("me/gates@v1", "v1")
    assert locate("testbed-lexical") == GATES_FOLDER / "testbed-lexical"
    folder = save(tmp_path / "with@sign")
    assert locate("with@sign") == Path("with@sign")
    with pytest.raises(UsageError, match="give one revision"):
        locate("me/gates@v1", "v2")
    with pytest.raises(UsageError, match="give one revision"):
        locate("me/gates@")
    with pytest.raises(UsageError, match="is a folder and has no revision"):
        locate(folder, "v1")
    Path("runs").mkdir()
    with pytest.raises(GateError, match="no gates in"):
        locate("runs/nowhere")
    with pytest.raises(UsageError, match="no Hub id"):
        locate("a/b/c")


@pytest.mark.parametrize("name", ["config.json", "README.md", "run.json"])
def test_what_is_too_large_is_not_fetched(hub, client, tmp_path, name):
    client("push", save(tmp_path / "gates"), "me/large")
    files = hub.files("me/large")
    large = files[name] + b" " * (11 if name == "run.json" else 2) * 2**20
    hub.repositories["me/large"].commit("main", files | {name: large}, name)
    before = len(hub.requests)
    told = (name, f"{len(large)} bytes", "gates at most", "is it the right repository?")
    is_told(client("pull", "me/large", "--out", tmp_path / "back"), 1, *told)
    for call in ("Gates.from_pretrained",) + ("AutoModel.from_pretrained",) * (name != "config.json"):
        code = f"from learnevict import Gates\nfrom transformers import AutoModel\nresult = {call}('me/large')"
        with pytest.raises(AssertionError, match=rf"GateError.*{name} .*{len(large)} bytes.*gates at most"):
            client.run(code)
    fetched = {path.rpartition("/")[2] for _, path in hub.requests[before:] if "resolve" in path}
    assert not fetched & {name, "model.safetensors"}


@pytest.mark.parametrize("kind", ["swap", "swell"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md"])
def test_other_bytes_than_the_hub_states_are_not_taken(hub, client, tmp_path, name, kind):
    """Nor kept in the cache: the same command fetches them again."""
    folder = save(tmp_path / "gates", change=len(name) + len(kind) / 8)
    repository = f"me/bytes-{kind}-{name[:5]}"
    client("push", folder, repository)
    hub.fail("GET", f"resolve/.*/{name}", kind)
    said = "hash" if kind == "swap" else "more than the"
    is_told(client("pull", repository, "--out", tmp_path / "back"), 1, name, said, "give the same command again")
    assert not (tmp_path / "back").exists()
    code, _, err = client("pull", repository, "--out", tmp_path / "back")
    assert code == 0, err
    same(folder, tmp_path / "back")


def test_a_trickle_is_not_waited_for(hub, client, tmp_path):
    """20 bytes a second keep a connection alive for ever."""
    client("push", save(tmp_path / "gates"), "me/trickle")
    hub.fail("GET", "resolve/.*safetensors", "trickle")
    code = (
        "from importlib import import_module\nfetch = import_module('learnevict.hub.download')\n"
        "result, fetch.GRACE = fetch.GRACE, given"
    )
    usual = client.run(code, given=1.0)
    start = time.monotonic()
    is_told(client("pull", "me/trickle", "--out", tmp_path / "back"), 1, "too slowly", "give the same command again")
    assert time.monotonic() - start < 30
    client.run(code, given=usual)
    assert client("pull", "me/trickle", "--out", tmp_path / "back")[0] == 0


@pytest.mark.parametrize(
    ("words", "path", "kind"),
    [
        (("pull", "me/slow"), "/api/models/me/slow", "trickle"),
        (("pull", "me/slow"), "/api/models/me/slow", "dawdle"),
        (("pull", "me/slow"), "/me/slow/resolve/.*README", "dawdle"),
        (("push", "GATES", "me/slow"), "/api/models/me/slow", "trickle"),
        (("push", "GATES", "slow"), "/api/whoami", "dawdle"),
    ],
)
def test_the_answer_to_a_question_has_a_limit_as_a_whole(hub, client, tmp_path, words, path, kind):
    """Bytes of its header or its body may come now and then for ever."""
    folder = save(tmp_path / "gates")
    client("push", folder, "me/slow")
    code = "from learnevict.hub import repo\nresult, repo.ANSWER = repo.ANSWER, given"
    usual = client.run(code, given=1.0)
    hub.fail("GET", path, kind, times=9)
    start = time.monotonic()
    words = [folder if word == "GATES" else word for word in words]
    words += ["--out", tmp_path / "back"] * (words[0] == "pull")
    told = client(*words)
    client.run(code, given=usual)
    hub.mishaps.clear()
    is_told(told, 1, "no whole answer within 1 s", "give the same command again")
    assert time.monotonic() - start < 20
    assert not (tmp_path / "back").exists()


# --- the card, there ---


def rows_of(gates: str | Path, out: Path) -> Path:
    """A file of rows as `learnevict eval` writes it for gates of foresightkv."""
    rows = [json.loads(line) for line in (RESULTS / "main" / "program.jsonl").read_text().splitlines()]
    ours = weight_hash(Gates.load(gates))
    rows = [row | {"gates": ours if row["method"] == "foresightkv" else None} for row in rows]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows if row["method"] != "foresightkv-sl"))
    return out


def test_the_example_of_a_card_runs(hub, client, tmp_path):
    rows = rows_of("testbed-foresightkv", tmp_path / "rows.jsonl")
    is_told(
        client("push", "testbed-foresightkv-sl", "me/wrong", "--results", rows), 2, "none of these gates", "eval --ckpt"
    )
    assert "me/wrong" not in hub.repositories
    assert client("push", "testbed-foresightkv", "me/example", "--results", rows)[0] == 0
    text = hub.files("me/example")["README.md"].decode()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    client.run(
        code.replace("max_new_tokens=128", "max_new_tokens=4") + "\nassert cache.nbytes < cache.full_nbytes\nresult = 1"
    )
    (command,) = re.findall(r"```bash\nlearnevict (.*?)\n```", text)
    assert client(*command.split(), "-n", 4)[0] == 0


def test_a_text_of_ones_own_goes_up_as_it_is(hub, client, tmp_path):
    folder = save(tmp_path / "gates")
    own = "---\nlicense: mit\n---\n\nMine.\n"
    (folder / "README.md").write_text(own)
    assert client("push", folder, "me/own")[0] == 0
    assert hub.files("me/own")["README.md"].decode() == own
    rows = rows_of(folder, tmp_path / "rows.jsonl")
    is_told(client("push", folder, "me/own", "--results", rows), 2, "a text of your own")
    (folder / "README.md").unlink()
    assert client("push", folder, "me/own", "--results", rows)[0] == 0
    assert "License: mit" in hub.files("me/own")["README.md"].decode(), "what the repository states is kept"
