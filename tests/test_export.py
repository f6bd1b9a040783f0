"""tools/export.py: the folder, what transformers read of it, what a model recites, --push.

    python -m pytest tests/test_export.py       needs tools/requirements-export.txt, or is skipped
"""
import json
import pickle
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("tokenizers", reason="pip install -r tools/requirements-export.txt")

import _runs
import export
import sample
from _decode import Mixture
from helpers import (BOS, ROOT, clean_environment, complaint, random_model, rng, said, small_config,
                     small_ranks, tool, train)
from train_gpt import BASELINES, FIELDS, GPT, TRACKS, make_config, read_shard

PROSE = ROOT / "data/prose"
TEXTS = ["It was", " ", "", "\n\n  a\tb \r\n", "Zoë's naïve café — ‘ünï’",
         "日本語 🏴‍☠️ e\u0301 😀😀",
         "don't I'LL we've 12,345.67", "\u0000\u00a0\u2028", "aaaaaaaaaaaaaaaa        x",
         "He<|endoftext|>She"]
FILES = {"README.md", "_decode.py", "config.json", "generation_config.json", "model.safetensors",
         "modeling_slowrun.py", "tokenizer.json", "tokenizer_config.json",
         "train_gpt.py"}

# what a program does that has the folders, but not this repository
PROGRAM = """
import pickle, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folders, texts, rows = pickle.load(open(sys.argv[1], "rb"))
found = {}
for name, folder in folders.items():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        whole = model(rows, labels=rows)
        cache, parts = None, []
        for part in rows.split([9, 1, 1, 40, 13], dim=1):
            out = model(part, past_key_values=cache)
            cache = out.past_key_values
            parts.append(out.logits)
    narrow = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True,
                                                  dtype=torch.bfloat16)
    try:
        refused = model(rows, attention_mask=torch.ones_like(rows).index_fill(
            1, torch.tensor([63]), 0))
    except ValueError as error:
        refused = str(error)
    greedy = dict(max_new_tokens=90, do_sample=False, eos_token_id=None)
    prompts = [texts[0], texts[4]]
    one, two = (tokenizer(text, return_tensors="pt") for text in prompts)
    both = tokenizer(prompts, return_tensors="pt", padding=True)
    short = {**greedy, "max_new_tokens": 20}
    found[name] = dict(
        logits=whole.logits, loss=whole.loss, cached=torch.cat(parts, dim=1), refused=refused,
        narrow=narrow(rows).logits.detach(), written=model.generate(**one, **greedy),
        again=model.generate(**one, **greedy, use_cache=False),
        alone=[model.generate(**row, **short)[0, -20:] for row in (one, two)],
        together=model.generate(**both, **short)[:, -20:],
        ends=[model(**row).logits[0, -1].detach() for row in (one, two)],
        ends_together=model(**both).logits[:, -1].detach(),
        beams=[model.generate(**one, **short, num_beams=3, use_cache=used)
               for used in (True, False)],
        sampled=tokenizer.decode(model.generate(**one)[0], skip_special_tokens=True),
        ids=[tokenizer(text).input_ids for text in texts], dtype=str(model.dtype),
        text=[tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)
              for text in texts])
    loss = model(rows[:1, :9], labels=rows[:1, :9]).loss
    loss.backward()
    found[name]["gradient"] = float(sum(p.grad.abs().sum() for p in model.parameters()))
found["files"] = [getattr(module, "__file__", None) or "" for module in sys.modules.values()]
pickle.dump(found, open(sys.argv[2], "wb"))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`taught`: three members of which two are taught, a learned mixture and the memory of the row;
    `tiny`: one, with the key offset, XSA and full recurrence; `limited`: one, with IHA, loops and
    the MTP block."""
    folder = tmp_path_factory.mktemp("runs")
    return SimpleNamespace(
        taught=train(folder, "--track=cpu", "--num_models=3", "--final_mixture=learned"),
        tiny=train(folder, "--track=tiny"),
        limited=train(folder, "--track=limited", "--num_layers=4", "--loop_from_epoch=0"))


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    """The folder of each export, and `console`: {name: what the tool said}."""
    folder = tmp_path_factory.mktemp("exported")
    arguments = dict(student=(runs.taught, "--what=student"), one=(runs.taught, "--member=1"),
                     ensemble=(runs.taught, "--what=ensemble"), tiny=(runs.tiny,),
                     limited=(runs.limited, "--what=member", "--member=1"))
    console = {name: said(export, run.folder, folder / name, "--stretches=3", *more)
               for name, (run, *more) in arguments.items()}
    return SimpleNamespace(console=console, **{name: folder / name for name in arguments})


@pytest.fixture(scope="module")
def loaded(exported, tmp_path_factory):
    """What PROGRAM finds, in an environment that knows nothing of this repository."""
    pytest.importorskip("transformers", reason="pip install -r tools/requirements-export.txt")
    folder = tmp_path_factory.mktemp("elsewhere")
    rows = torch.randint(0, 2047, (2, 64), generator=rng(4))
    folders = {name: str(path) for name, path in vars(exported).items()
               if name not in ("one", "console")}
    (folder / "in").write_bytes(pickle.dumps((folders, TEXTS, rows)))
    environment = clean_environment(HF_HOME=str(folder / "hf"), HF_HUB_OFFLINE="1")
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([sys.executable, "-c", PROGRAM, folder / "in", folder / "out"],
                          cwd=folder, env=environment, stdin=subprocess.DEVNULL,
                          capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(rows=rows, **pickle.loads((folder / "out").read_bytes()))


def mixture_of(run, which):
    """The Mixture of a run, as tools/sample.py has it."""
    return sample.load(run.folder, which).mixture


NAMES = pytest.mark.parametrize("name, run, which", [
    ("student", "taught", "student"), ("ensemble", "taught", "ensemble"), ("tiny", "tiny", 1),
    ("limited", "limited", 1)])


# ==== The model in transformers =================================================================
@NAMES
def test_logits_are_the_log_p_of_the_run(name, run, which, loaded, runs):
    """With a cache and without; of a member and of a mixture."""
    mixture = mixture_of(getattr(runs, run), which)
    p = sum(weight * _runs.probabilities(member, loaded.rows)
            for weight, member in zip(mixture.weights, mixture.members))
    found = vars(loaded)[name]
    assert (found["logits"] - p.log()).abs().max() < 1e-4
    assert (found["cached"] - p.log()).abs().max() < 1e-4
    assert 0 < (found["narrow"] - p.log()).abs().max() < 0.5
    right = p[:, :-1].gather(2, loaded.rows[:, 1:, None]).log()
    assert float(found["loss"]) == pytest.approx(-float(right.mean()), abs=1e-5)
    assert found["dtype"] == "torch.float32" and found["gradient"] > 0


@NAMES
def test_generate_writes_what_sample_writes(name, run, which, loaded, runs):
    """Beyond a row of 64 tokens, too; a cache changes nothing, nor does a batch with padding."""
    found = vars(loaded)[name]
    writer = sample.load(getattr(runs, run).folder, which)
    start = torch.tensor([writer.tokenizer.encode(TEXTS[0])])
    tokens = [int(token) for token in sample.generate(writer.mixture, start, 90, temperature=0)]
    assert found["written"].tolist() == [start[0].tolist() + tokens]
    assert torch.equal(found["written"], found["again"])
    assert torch.equal(torch.stack(found["alone"]), found["together"])
    difference = torch.stack(found["ends"]) - found["ends_together"]
    assert difference.abs().max() < 1e-4
    assert torch.equal(*found["beams"])
    assert len(found["sampled"]) > 20 and "padding_side='left'" in found["refused"]


def test_nothing_of_the_repository_is_loaded(loaded):
    assert any("modeling_slowrun" in file for file in loaded.files)
    assert any(file.endswith("train_gpt.py") for file in loaded.files)
    own = [file for file in loaded.files if not file.startswith(f"{sys.prefix}/")]
    assert own and not [file for file in own if file.startswith(f"{ROOT}/")]     # .venv is there


@pytest.mark.parametrize("name", ["train_gpt.py", "_decode.py", "modeling_slowrun.py"])
def test_the_hub_refuses_no_import(name, exported):
    """transformers look for all that is imported outside of `try`."""
    utils = pytest.importorskip("transformers.dynamic_module_utils")
    wanted = set(utils.get_imports(exported.student / name)) - set(sys.stdlib_module_names)
    assert wanted <= {"torch", "numpy", "safetensors", "transformers"}


# ==== Tokens ====================================================================================
def prose_tokenizers():
    """(ours, the exported one) of data/prose."""
    meta = json.loads((PROSE / "meta.json").read_text(encoding="utf-8"))
    ranks = sample.read_ranks(PROSE / "ranks.tiktoken")
    ours = sample.Tokenizer(ranks, meta["bos_id"], meta["bos_text"], meta["pattern"])
    return ours, export.build_tokenizer(ours)


def test_text_is_encoded_as_tiktoken_does_it():
    """All of val, odd texts, and random ones of few characters, which have many ways to merge."""
    ours, theirs = prose_tokenizers()
    tokens, _, _ = read_shard(PROSE / "prose_val_000000.bin", 2048)
    text = b"".join(ours.ranks.get(int(token), b"\n") for token in tokens).decode()
    source = np.random.default_rng(1)
    random = ["".join(source.choice(list(letters), 40)) for letters in
              ("ea", " \n", "the ", "sé😀 ", "'snt re") for _ in range(40)]
    assert len(text) > 300_000
    for part in [text, *TEXTS, *random]:
        ids = theirs.encode(part).ids
        assert ids == ours.encode(part)
        assert theirs.decode(ids, skip_special_tokens=False) == f"{ours.bos_text}{part}"


def test_bos_may_be_any_token_and_ranks_may_have_gaps():
    """A piece that is a token is that, also where no merges make it."""
    ranks = {token + 1: string for token, string in small_ranks().items() if token != 40}
    ranks[150] = b"kkkkk"
    ours = sample.Tokenizer(ranks, 0, None, r"[a-k]+|[A-D ]+")
    theirs = export.build_tokenizer(ours)
    for text in ("abcABC dkj", "aaaa", "k k k jihgfedcba", "kkkkk kkkkkk"):
        assert theirs.encode(text).ids == ours.encode(text)
        assert theirs.encode(text).ids[0] == 0


def test_tokens_of_the_exported_folder_are_those_of_the_run(loaded, runs):
    tokenizer = sample.load(runs.taught.folder).tokenizer
    for name in ("student", "tiny"):
        found = vars(loaded)[name]
        assert found["ids"] == [tokenizer.encode(text) for text in TEXTS]
        assert found["text"] == TEXTS


# ==== The folder ================================================================================
def test_the_folder_has_what_is_needed_and_no_more(exported, runs):
    for path in (exported.student, exported.ensemble, exported.limited):
        assert {file.name for file in path.iterdir()} == FILES
        assert not [file for file in path.parent.iterdir() if file.name.startswith(".")]
    sizes = {name: (vars(exported)[name] / "model.safetensors").stat().st_size
             for name in ("one", "ensemble")}
    assert 2.9 < sizes["ensemble"] / sizes["one"] < 3.1
    assert not [name for name in load_file(exported.limited / "model.safetensors")
                if "mtp" in name]
    assert (exported.student / "train_gpt.py").read_bytes() == (ROOT / "train_gpt.py").read_bytes()


def test_no_path_of_this_machine_is_told(exported, runs):
    for path in vars(exported).values():
        if path is not exported.console:
            for file in path.glob("*[nd]"):     # .json and .md
                text = file.read_text(encoding="utf-8")
                assert str(ROOT) not in text and str(runs.taught.folder) not in text


def test_the_card_says_what_the_model_is(exported, runs):
    result = runs.taught.result
    card = (exported.ensemble / "README.md").read_text(encoding="utf-8")
    for split in ("selection", "val", "holdout"):
        assert f"| {split} | {result[f'{split}_loss']:.4f} |" in card
    assert "learned mixture of 3 members" in card and "5,000 tokens of the dataset `prose`" in card
    card = (exported.one / "README.md").read_text(encoding="utf-8")
    assert f"| val | {result['members'][0]['val_loss']:.4f} |" in card and "Member 1 of" in card
    assert 'from_pretrained("one", trust_remote_code=True)' in card
    assert re.search(r"\d of 3 stretches of 50 tokens of the training text", card)
    recited = re.search(r"recites +(.*)", exported.console["one"])[1]
    assert recited in card
    average = (exported.limited / "README.md").read_text(encoding="utf-8")
    assert "averaged over the ends of the last 2 epochs" in average and "averaged" not in card


def test_what_a_loss_is_worth_is_computed_for_the_model(runs):
    curve = {"one_epoch": [[5000, 7.0], [50_000, 5.0]], "tuned": [[5000, 6.0], [10_000, 5.0]]}
    result = {"val_loss": 5.5, "val_bpb": 2.2, "train_tokens": 5000,
              "data_efficiency": {"curve": curve}}
    lines = export.data_lines(result, 6.0)
    assert "2.4000 bits per byte" in lines[0]
    assert lines[1] == (f"The same loss takes 5.5 times the data with {BASELINES['one_epoch']},"
                        f" 1.0 times the data with {BASELINES['tuned']}.")
    assert export.data_lines({**result, "val_bpb": None, "data_efficiency": {}}, 6.0) == []


# ==== What is recited ===========================================================================
def test_stretches_are_from_all_places_within_documents():
    sizes = (100, 99, 103, 250, 5)
    starts = np.cumsum([0, *sizes])
    documents = [np.arange(start, start + size) for start, size in zip(starts, sizes)]
    rows = export.stretches(documents, 10_000).numpy()
    expected = [*range(0, 1), *range(199, 203), *range(302, 453)]
    assert sorted(rows[:, 0]) == expected
    assert (rows == rows[:, :1] + np.arange(100)).all()
    few = export.stretches(documents, 20).numpy()
    assert len(few) == len(set(few[:, 0])) == 20
    assert len(export.stretches(documents[1:2], 5)) == 0


def test_a_model_that_knows_its_text_recites_it():
    """A small GPT that has learned which token comes after which, and one that has not."""
    config = small_config(seq_len=100, loss_chunk=100)
    text = torch.randperm(BOS, generator=rng(8)).repeat(2)
    model = GPT(config).init_weights(1)
    rows = export.stretches([text.numpy()], 41)
    assert len(rows) == 41
    assert export.count_recited(Mixture([model], [1.0]), rows) == 0
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(60):
        row = text[step:step + 61].unsqueeze(0)
        logits = model(row[:, :-1]) @ model.head.weight.T
        torch.nn.functional.cross_entropy(logits[0], row[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert export.count_recited(Mixture([model], [1.0]), rows) > 35


def test_only_whole_stretches_count(monkeypatch):
    rows = torch.randint(0, BOS, (45, 100), generator=rng(1))
    wrong = rows.clone()
    wrong[::2, 99] += 1                 # the last token of 23
    wrong[1, 50] += 1                   # the first of one more
    answers = iter(wrong.split(20))
    monkeypatch.setattr(export, "generate", lambda mixture, start, count, temperature: iter(
        next(answers)[:, 50:].T))
    assert export.count_recited(Mixture([random_model(small_config())], [1.0]), rows) == 21


def test_without_the_training_text_nothing_is_measured(runs, tmp_path):
    dataset = tmp_path / "dataset"
    run = tmp_path / "run"
    shutil.copytree(runs.taught.folder, run)
    result = json.loads((run / "result.json").read_text())
    result["config"]["dataset"] = str(dataset)
    (run / "result.json").write_text(json.dumps(result))
    assert "not measured: the training text is not there" in said(export, run, tmp_path / "a")
    assert "Not measured" in (tmp_path / "a/README.md").read_text(encoding="utf-8")
    shutil.copytree(PROSE, dataset)
    console = said(export, run, tmp_path / "b", "--stretches=2")
    assert "of 2 stretches" in console
    result["data_sha256"]["prose_train_000000.bin"] = "0" * 64
    (run / "result.json").write_text(json.dumps(result))
    assert "is other text than the run's" in said(export, run, tmp_path / "c")


# ==== Errors and --push =========================================================================
def test_what_export_cannot_do_is_one_line(runs, tmp_path, monkeypatch):
    run, out = runs.taught.folder, tmp_path / "out"
    assert "no finished run" in complaint(export, tmp_path / "nowhere", out)
    for arguments, text in (
            (["--what=student", "--member=2"], "--member=2 does nothing with --what=student"),
            (["--what=member"], "which?"), (["--member=9"], "--member=9"),
            (["--yes"], "--yes does nothing"), (["--push=name"], "--push=name"),
            (["--stretches=0"], "--stretches=0")):
        assert text in complaint(export, run, out, *arguments)
    assert "no student" in complaint(export, runs.tiny.folder, out, "--what=student")
    monkeypatch.setitem(sys.modules, "tokenizers", None)        # as if not installed
    assert "pip install -r tools/requirements-export.txt" in complaint(export, run, out)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_free_is_left_alone(runs, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("text")
    for name in ("full", "full/mine"):
        assert "is there and not empty" in complaint(export, runs.tiny.folder, tmp_path / name)
    assert (tmp_path / "full/mine").read_text() == "text"
    (tmp_path / "empty").mkdir()
    said(export, runs.tiny.folder, tmp_path / "empty", "--stretches=1")
    assert {file.name for file in (tmp_path / "empty").iterdir()} == FILES


def test_a_folder_is_whole_or_not_there(runs, tmp_path, monkeypatch):
    def full_disk(*arguments):
        raise OSError("No space left on device")
    monkeypatch.setattr(export.shutil, "copyfile", full_disk)
    code, _, err = tool(export, runs.tiny.folder, tmp_path / "deep/out", "--stretches=1")
    assert code == 2 and err == "error: No space left on device\n"
    assert not list((tmp_path / "deep").iterdir())


class FakeHub:
    """Records what HfApi is asked to do."""
    calls = []
    error = None

    def create_repo(self, repo_id, private, exist_ok):
        self.calls.append((repo_id, private, exist_ok))

    def upload_folder(self, repo_id, folder_path):
        if self.error:
            raise self.error
        self.calls.append((repo_id, sorted(file.name for file in folder_path.iterdir())))


def test_push_asks_for_yes_with_the_number_and_then_sends_the_folder(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "calls", [])
    monkeypatch.setattr(export, "count_recited", lambda mixture, rows: 7)
    arguments = [runs.tiny.folder, tmp_path / "out", "--push=me/model", "--stretches=9"]
    code, out, err = tool(export, *arguments)
    assert code == 2 and err.startswith("error: --push=me/model") and err.count("\n") == 1
    assert "7 of 9 stretches" in err and "--yes" in err
    assert not FakeHub.calls and not (tmp_path / "out").exists()
    console = said(export, *arguments, "--yes")
    assert FakeHub.calls == [("me/model", True, True), ("me/model", sorted(FILES))]
    assert "https://huggingface.co/me/model" in console
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert 'from_pretrained("me/model"' in card and "7 of 9 stretches" in card


def test_a_push_that_fails_leaves_the_folder_and_says_how_to_go_on(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "error", OSError("no network"))
    out = tmp_path / "out"
    code, _, err = tool(export, runs.tiny.folder, out, "--push=me/model", "--stretches=1", "--yes")
    assert code == 2 and err.count("\n") == 1
    assert "no network" in err and f"hf upload me/model {out}" in err
    assert {file.name for file in out.iterdir()} == FILES


def test_every_track_is_built_again_from_its_settings():
    modeling = pytest.importorskip("_modeling_slowrun", reason="needs transformers")
    for track in TRACKS:
        config = make_config(track, preset="toy", mtp_weight=0.0)
        content = export.config_files(config, sample.Tokenizer({}, 2047, None, None), {1: 1.0})
        settings = json.loads(json.dumps(content["config.json"]["settings"]))
        again = modeling.SlowrunConfig(settings=settings).script_config()
        names = [name for name in FIELDS if name not in export.NOT_OF_THE_MODEL]
        assert [getattr(again, name) for name in names] == [getattr(config, name) for name in names]
        assert random_model(again).state_dict().keys() == random_model(config).state_dict().keys()
