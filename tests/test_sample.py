"""What trained models write: reading with kept keys and values, choosing tokens, tools/sample.py.

    python -m pytest tests/test_sample.py
"""
import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import _runs
import sample
from _decode import Mixture, choose, generate
from helpers import (BOS, ROOT, clean_environment, complaint, make_dataset, python, random_model,
                     random_tokens, rng, said, small_config, tool, train)
from token_tables import read_ranks
from train_gpt import TRACKS, make_config

SAMPLE = str(ROOT / "tools/sample.py")
PROSE = ROOT / "data/prose"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`plain` has two members and a learned mixture, and no memory of the row; `taught` has three,
    of which the last two are taught."""
    folder = tmp_path_factory.mktemp("runs")
    plain = train(folder, "--track=mini", "--num_models=2", "--final_mixture=learned",
                  "--kd_alpha=0", "--row_memory=false")
    taught = train(folder, "--track=cpu", "--num_models=3")
    return SimpleNamespace(plain=plain, taught=taught)


def copied(run, folder, config=None, **changes):
    """A copy of a run in `folder`, without its own tokenizer and with `changes` in its result.json;
    returns `folder`."""
    shutil.copytree(run.folder, folder)
    shutil.rmtree(folder / "tokenizer")
    result = {**run.result, **changes, "config": {**run.result["config"], **(config or {})}}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def text_of(output):
    """(What is said of the model, its text) of what sample.py prints."""
    head, _, text = output.partition(":\n\n")
    return head, text


# ==== Reading ===================================================================================
def expected_logp(model, tokens):
    """log p by train_gpt.py's own forward, of a row at most: [B, T, V]."""
    return _runs.probabilities(model, tokens).log()


def read(model, *parts, padding=None):
    """log p [B, T, V] of a model that reads int64 [B, t], one after the other."""
    mixture = Mixture([model], [1.0])
    readers = mixture.readers(torch.zeros(len(parts[0]), dtype=torch.long)
                              if padding is None else padding)
    with torch.no_grad():
        return torch.cat([mixture(part, readers, part.shape[1]) for part in parts], dim=1)


@pytest.mark.parametrize("row_memory", [False, True])
@pytest.mark.parametrize("track", TRACKS)
def test_what_is_read_bit_by_bit_has_the_logits_of_the_whole_row(track, row_memory):
    config = make_config(track, preset="toy", row_memory=row_memory, seq_len=24, loss_chunk=24)
    model = random_model(config)
    tokens = random_tokens(config, 2, 24)
    expected = expected_logp(model, tokens)
    for sizes in ([24], [1] * 24, [7, 1, 1, 9, 6]):
        found = read(model, *tokens.split(sizes, dim=1))
        assert (found - expected).abs().max() < 1e-9


@pytest.mark.parametrize("changes", [
    dict(key_offset=True, rope_fraction=0.5), dict(xsa=True), dict(iha=True),
    dict(loop_start=1, loop_end=2, loop_count=3), dict(recurrence_from=0.5), dict(unet=False),
    dict(window_schedule=((0, 0.25, 0.5), (0.5, 0.5, 0.75))), dict(row_memory=True, loss_chunk=12),
    dict(value_projections=False, attn_gate=False, qk_norm=False), dict(mtp_weight=0.3),
    dict(softcap=0.0)], ids=lambda changes: next(iter(changes)))
def test_each_part_of_a_model_is_read_bit_by_bit(changes):
    """With the part the logits are others, so what is compared has it."""
    model = random_model(small_config(**changes))
    tokens = random_tokens(model.config, 1, 12)
    expected = expected_logp(model, tokens)
    assert (read(model, *tokens.split([1, 4, 1, 6], dim=1)) - expected).abs().max() < 1e-9


def test_logits_of_fp32_are_equal_to_1e_4():
    model = random_model(make_config("tiny", preset="toy", row_memory=True)).float()
    model.dtype = torch.float32
    tokens = random_tokens(model.config, 2, 64)
    found = read(model, *tokens.split([40, *[1] * 24], dim=1))
    assert found.dtype == torch.float32
    assert (found - expected_logp(model, tokens)).abs().max() < 1e-4


def test_only_the_last_tokens_are_predicted_if_no_more_are_wanted():
    model = random_model(small_config(row_memory=True, loss_chunk=12))
    tokens = random_tokens(model.config, 2, 30)
    whole = read(model, tokens)
    for last in (1, 5, 29):
        mixture = Mixture([model], [1.0])
        with torch.no_grad():
            part = mixture(tokens, mixture.readers(torch.zeros(2, dtype=torch.long)), last)
        assert torch.allclose(part, whole[:, -last:], atol=1e-12)


@pytest.mark.parametrize("track", ["cpu", "tiny", "limited"])
def test_padding_in_front_of_a_row_changes_nothing(track):
    """But the digits: the rotary embedding of other positions is rounded to fp32."""
    config = make_config(track, preset="toy", seq_len=24, loss_chunk=24)
    model = random_model(config)
    tokens = random_tokens(config, 2, 20)
    padded = torch.cat((torch.full((2, 4), 5), tokens), dim=1)
    padded[1, 4:9] = 17                 # the second row has only 15 tokens
    found = read(model, *padded.split([13, 1, 10], dim=1), padding=torch.tensor([4, 9]))
    assert (found[:1, 4:] - expected_logp(model, tokens[:1])).abs().max() < 1e-5
    assert (found[1:, 9:] - expected_logp(model, tokens[1:, 5:])).abs().max() < 1e-5


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("sizes", [[43], [1] * 43, [10, 20, 1, 12]])
def test_beyond_a_row_its_last_half_is_read_again(sizes, padding):
    """Rows begin at 0, 6, 12, ... where rows of 12 are full."""
    model = random_model(small_config(row_memory=True, loss_chunk=12, key_offset=True,
                                      rope_fraction=0.5))
    tokens = random_tokens(model.config, 1, 43)
    found = read(model, *tokens.split(sizes, dim=1), padding=torch.tensor([padding]))
    for t in range(padding, 43):
        start = padding if t < 12 else (t - 12) // 6 * 6 + 6
        expected = expected_logp(model, tokens[:, start:t + 1])[:, -1]
        assert (found[:, t] - expected).abs().max() < 1e-5


def test_a_mixture_is_of_probabilities():
    models = [random_model(small_config(), seed) for seed in (1, 2)]
    models.append(random_model(small_config("cpu", row_memory=True, loss_chunk=12), 3))
    tokens = random_tokens(models[0].config, 2, 9)
    mixture = Mixture(models, [0.5, 0.2, 0.3])
    with torch.no_grad():
        found = mixture(tokens, mixture.readers(torch.zeros(2, dtype=torch.long)), 9).exp()
    parts = [weight * _runs.probabilities(model, tokens)
             for weight, model in zip((0.5, 0.2, 0.3), models)]
    assert torch.allclose(found, sum(parts), atol=1e-12)


def test_rows_change_places():
    model = random_model(small_config(row_memory=True, loss_chunk=12))
    tokens = random_tokens(model.config, 3, 9)
    reader, = Mixture([model], [1.0]).readers(torch.tensor([0, 2, 0]))
    order = torch.tensor([1, 1, 0])
    with torch.no_grad():
        reader.read(tokens[:, :5], 1)
        reader.reorder(order)
        found = reader.read(tokens[order, 5:], 1)
    straight = read(model, tokens, padding=torch.tensor([0, 2, 0]))[order, -1:]
    assert torch.allclose(found, straight, atol=1e-12)


# ==== Choosing ==================================================================================
def drawn(p, temperature=1.0, top_k=0, top_p=1.0, count=20_000):
    """How often each token is drawn from p [V]."""
    logp = torch.tensor(p, dtype=torch.float64).log().expand(count, -1)
    tokens = choose(logp, temperature, top_k, top_p, rng(3))
    return np.bincount(tokens.numpy(), minlength=len(p)) / count


@pytest.mark.parametrize("options, expected", [
    (dict(), [0.1, 0.4, 0.2, 0.3]), (dict(temperature=0), [0, 1, 0, 0]),
    (dict(temperature=0.5), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
    (dict(top_k=2), [0, 4 / 7, 0, 3 / 7]), (dict(top_k=99), [0.1, 0.4, 0.2, 0.3]),
    (dict(top_p=0.35), [0, 1, 0, 0]), (dict(top_p=0.41), [0, 4 / 7, 0, 3 / 7]),
    (dict(top_p=0.8), [0, 4 / 9, 2 / 9, 3 / 9]), (dict(top_k=3, top_p=0.5), [0, 4 / 7, 0, 3 / 7]),
    (dict(temperature=0.5, top_p=0.6), [0, 16 / 25, 0, 9 / 25])], ids=str)
def test_tokens_are_drawn_from(options, expected):
    assert np.abs(drawn([0.1, 0.4, 0.2, 0.3], **options) - expected).max() < 0.015


def test_the_likeliest_tokens_are_those_of_the_whole_row():
    """Of a mixture, without a cache, token by token."""
    models = [random_model(small_config(row_memory=memory, loss_chunk=12), memory)
              for memory in (False, True)]
    start = random_tokens(models[0].config, 2, 3)
    tokens = start
    for _ in range(9):
        p = sum(_runs.probabilities(model, tokens)[:, -1] for model in models)
        tokens = torch.cat((tokens, p.argmax(dim=1, keepdim=True)), dim=1)
    written = list(generate(Mixture(models, [0.5, 0.5]), start, 9, temperature=0))
    assert torch.equal(torch.stack(written, dim=1), tokens[:, 3:])
    assert len(set(tokens.flatten().tolist())) > 5


def test_a_seed_is_a_text():
    mixture = Mixture([random_model(small_config())], [1.0])
    texts = [[int(token) for token in generate(mixture, torch.tensor([[BOS]]), 30, seed=seed)]
             for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


# ==== Tokens ====================================================================================
def written(monkeypatch, tokenizer, tokens):
    """The pieces of text of a model that writes `tokens`."""
    monkeypatch.setattr(sample, "generate", lambda mixture, start, count, **options: iter(
        torch.tensor(tokens).view(-1, 1)[:count]))
    mixture = Mixture([random_model(small_config())], [1.0])
    return list(sample.Writer(mixture, tokenizer, "").stream())


def test_pieces_are_of_whole_characters(monkeypatch):
    """A token may be a part of a character; what is none is a replacement character."""
    strings = "Zoë 😀".encode()
    ranks = {i: strings[i:i + 1] for i in range(len(strings))}
    tokenizer = sample.Tokenizer(ranks, 99, None, None)
    pieces = written(monkeypatch, tokenizer, range(len(strings)))
    assert "".join(pieces) == "Zoë 😀" and [piece for piece in pieces if piece] == list("Zoë 😀")
    assert "".join(written(monkeypatch, tokenizer, [0, 3, 0, 6])) == "Z\ufffdZ\ufffd"
    assert "".join(written(monkeypatch, tokenizer, [0, 1, 99, 2])) == "Zo"      # BOS ends the text


def test_prompts_are_encoded_after_bos(runs):
    tokenizer = sample.load(runs.plain.folder).tokenizer
    ranks = read_ranks(PROSE / "ranks.tiktoken")
    meta = json.loads((PROSE / "meta.json").read_text(encoding="utf-8"))
    assert tokenizer.encode("") == [meta["bos_id"]]
    for prompt in ("It was", " ", "\n\n", "Zoë 😀 日本語\u0000"):
        first, *tokens = tokenizer.encode(prompt)
        assert first == meta["bos_id"] not in tokens
        assert b"".join(ranks[token] for token in tokens).decode() == prompt
    parts = [tokenizer.encode(part) for part in ("He", "She")]
    assert tokenizer.encode(f"He{meta['bos_text']}She") == parts[0] + parts[1]


def own_tokenizer(run, ranks, **changes):
    """Give `run` a folder `tokenizer` with the ranks {token: bytes} and prose's meta.json."""
    folder = run / "tokenizer"
    folder.mkdir(exist_ok=True)
    lines = b"".join(b"%s %d\n" % (base64.b64encode(string), token)
                     for token, string in ranks.items())
    (folder / "ranks.tiktoken").write_bytes(lines)
    meta = json.loads((PROSE / "meta.json").read_text(encoding="utf-8"))
    meta |= {"ranks_sha256": hashlib.sha256(lines).hexdigest(), **changes}
    (folder / "meta.json").write_text(json.dumps(meta))


def test_the_runs_own_tokens_come_first_and_need_no_dataset(runs, tmp_path):
    run = copied(runs.taught, tmp_path / "run", config={"dataset": "nowhere"})
    assert "nowhere" in complaint(sample, run)
    ranks = read_ranks(PROSE / "ranks.tiktoken")
    own_tokenizer(run, ranks)
    assert said(sample, run, "--prompt=It") == said(sample, runs.taught.folder, "--prompt=It")
    own_tokenizer(run, {token: b"x" for token in ranks})
    _, text = text_of(said(sample, run))
    assert set(text.strip()) == {"x"}
    own_tokenizer(run, ranks, ranks_sha256="0" * 64)
    error = complaint(sample, run)
    assert str(run / "tokenizer") in error and "not those" in error


def test_other_tokens_of_the_dataset_are_refused(runs, tmp_path):
    """Those of a dataset that was built again."""
    dataset = tmp_path / "dataset"
    shutil.copytree(PROSE, dataset)
    run = copied(runs.taught, tmp_path / "run", config={"dataset": str(dataset)})
    assert said(sample, run) == said(sample, runs.taught.folder)
    ranks = read_ranks(PROSE / "ranks.tiktoken")
    swapped = {**ranks, 300: ranks[400], 400: ranks[300]}
    (dataset / "ranks.tiktoken").write_bytes(b"".join(
        b"%s %d\n" % (base64.b64encode(string), token) for token, string in swapped.items()))
    assert "its tokens are not those" in complaint(sample, run)
    sha256 = hashlib.sha256((dataset / "ranks.tiktoken").read_bytes()).hexdigest()
    meta = json.loads((dataset / "meta.json").read_text(encoding="utf-8"))
    (dataset / "meta.json").write_text(json.dumps(meta | {"ranks_sha256": sha256}))
    subprocess.run([sys.executable, ROOT / "data/token_tables.py", dataset], check=True,
                   capture_output=True)
    assert "its tokens are not those" in complaint(sample, run)


# ==== Which model ===============================================================================
def test_the_model_that_writes_is_the_one_asked_for(runs):
    for run in (runs.plain, runs.taught):
        members = run.result["members"]
        best = 1 + int(np.argmin([member["selection_loss"] for member in members]))
        assert f"member {best} writes" in said(sample, run.folder)
    learned = runs.plain.result["ensemble"][-1]["weights_learned"]
    assert sample.load(runs.plain.folder, "ensemble").mixture.weights == pytest.approx(learned)
    uniform = sample.load(runs.taught.folder, "ensemble").mixture
    assert uniform.weights == pytest.approx([1 / 3] * 3) and len(uniform.members) == 3
    students = [member["selection_loss"] for member in runs.taught.result["members"][1:]]
    student = 2 + int(np.argmin(students))
    assert f"member {student}, a student writes" in said(sample, runs.taught.folder,
                                                         "--member=student")
    assert "no student" in complaint(sample, runs.plain.folder, "--member=student")
    texts = {text_of(said(sample, runs.taught.folder, f"--member={which}",
                          "--temperature=2"))[1]
             for which in (1, 2, 3, "ensemble")}
    assert len(texts) == 4


def test_a_member_that_weighs_nothing_is_left_out(runs, tmp_path):
    ensemble = [{**runs.plain.result["ensemble"][-1], "weights_learned": [0.0, 1.0]}]
    run = copied(runs.plain, tmp_path / "run", ensemble=ensemble)
    (run / "members/001.safetensors").unlink()
    _, text = text_of(said(sample, run, "--member=ensemble"))
    assert text == text_of(said(sample, runs.plain.folder, "--member=2"))[1]


def test_best_member_is_chosen_on_selection_or_else_on_train():
    members = [dict(selection_loss=2, train_loss=1), dict(selection_loss=1, train_loss=2)]
    assert sample.best_member(members) == 2
    assert sample.best_member([{"train_loss": member["train_loss"]} for member in members]) == 1


def test_a_model_is_loaded_in_one_line(runs, tmp_path):
    code = (f"import sys; sys.path.append({str(ROOT / 'tools')!r}); from sample import load; "
            f"print(load({str(runs.taught.folder)!r}, 'ensemble').generate_text("
            "'It was', tokens=20, temperature=0), end='')")
    assert code.split("; ")[2] in sample.__doc__
    done = python("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    arguments = ["--prompt=It was", "--tokens=20", "--temperature=0", "--member=ensemble"]
    _, text = text_of(said(sample, runs.taught.folder, *arguments))
    assert text == f"It was{done.stdout}\n" and len(done.stdout) > 5


# ==== The command ===============================================================================
def test_text_goes_on_from_the_prompt_and_begins_alike_if_there_is_more(runs):
    texts = [text_of(said(sample, runs.plain.folder, "--prompt=It was", f"--tokens={count}"))[1]
             for count in (1, 30, 60)]
    assert all(text.startswith("It was") for text in texts)
    assert texts[2].startswith(texts[1].rstrip("\n\ufffd"))
    assert len(texts[2]) > len(texts[1]) > len(texts[0])
    others = [text_of(said(sample, runs.plain.folder, "--prompt=It was", option))[1]
              for option in ("--seed=2", "--temperature=0.3", "--top_k=1", "--top_p=0.2")]
    greedy = text_of(said(sample, runs.plain.folder, "--prompt=It was", "--temperature=0"))[1]
    assert len({texts[2], greedy, *others[:2], others[3]}) == 5 and others[2] == greedy


@pytest.mark.parametrize("prompt", ["She had " * 60, "", "Zoë 😀 日本", "He<|endoftext|>She"],
                         ids=["longer than a row", "empty", "unicode", "with BOS"])
def test_any_prompt_works(prompt, runs):
    """A row of these runs has 64 tokens."""
    _, text = text_of(said(sample, runs.taught.folder, f"--prompt={prompt}", "--tokens=80"))
    assert text.startswith(prompt) and len(text) > len(prompt) + 20


def test_text_is_shown_while_it_is_written(runs):
    """A few tokens at a time, while thousands are to come."""
    environment = clean_environment()
    environment.pop("PYTHONUNBUFFERED", None)
    process = subprocess.Popen([sys.executable, SAMPLE, runs.taught.folder, "--tokens=100000"],
                               stdout=subprocess.PIPE, env=environment)
    shown = b""
    while len(shown) < 150:
        part = os.read(process.stdout.fileno(), 65536)
        assert 0 < len(part) < 2000
        shown += part
    assert process.poll() is None
    process.kill()
    process.wait()
    assert b" writes (temperature 0.8):\n\n" in shown


@pytest.mark.parametrize("encoding, shown", [("ascii", "?"), ("utf-8", "😀")])
def test_a_terminal_may_have_few_characters(encoding, shown, runs, tmp_path):
    run = copied(runs.plain, tmp_path / "run")
    own_tokenizer(run, dict.fromkeys(range(2047), "😀".encode()))
    done = python(SAMPLE, run, env=clean_environment(PYTHONIOENCODING=encoding))
    assert (done.returncode, done.stderr) == (0, "")
    _, text = text_of(done.stdout)
    assert set(text.strip()) == {shown} and len(text) > 20


def test_what_sample_cannot_do_is_one_line(runs, tmp_path, monkeypatch):
    assert "nowhere: no finished run" in complaint(sample, tmp_path / "nowhere")
    for argument in ("--member=9", "--member=0", "--member=two", "--temperature=-1", "--tokens=0",
                     "--temperature=nan", "--temperature=inf", "--top_k=0", "--top_p=0",
                     "--top_p=1.1", "--top_p=nan"):
        assert argument.partition("=")[0] in complaint(sample, runs.plain.folder, argument)
    for argument in ("--top_k=3", "--top_p=0.5", "--seed=0"):
        error = complaint(sample, runs.plain.folder, "--temperature=0", argument)
        assert f"{argument.partition('=')[0]} does nothing with --temperature=0" in error
    small = make_dataset(tmp_path / "small", tables=False)
    plain = {"spelling": False, "split_tokens": 0}      # which need tokens.npz
    run = copied(runs.plain, tmp_path / "run", config={"dataset": str(small), **plain})
    assert "ranks" in complaint(sample, run)
    shutil.copy(PROSE / "ranks.tiktoken", small)
    assert "pattern" in complaint(sample, run, "--prompt=It was")
    monkeypatch.setitem(sys.modules, "tiktoken", None)          # as if not installed
    assert "pip install tiktoken" in complaint(sample, runs.plain.folder, "--prompt=It was")
    assert len(said(sample, runs.plain.folder)) > 100           # is not needed here


def test_runs_without_their_members_are_one_line(runs, tmp_path):
    run = copied(runs.plain, tmp_path / "run")
    path = run / "members/002.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    assert complaint(sample, run, "--member=2").startswith(f"error: {path}: damaged (")
    path.unlink()
    assert complaint(sample, run, "--member=2").startswith(f"error: {path}: not there")
    assert said(sample, run, "--member=1")
    run = copied(runs.plain, tmp_path / "other", config={"num_layers": 77})
    assert "are of another model" in complaint(sample, run)


def test_what_is_mistyped_is_refused(runs):
    for argument in ("--num_layers=77", "--temp=1", "--count=5"):
        code, out, err = tool(sample, runs.plain.folder, argument)
        assert (code, out) == (2, "") and f"unrecognized arguments: {argument}" in err
