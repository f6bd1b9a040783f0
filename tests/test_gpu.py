"""What only a GPU can show; the first tests to run where there is one, skipped elsewhere.

    python -m pytest tests/test_gpu.py

Attention on every path, compiled code, bf16, CUDA's random state, NCCL, memory that runs out.
References are computed on the CPU in float64, or are the same run on the CPU.
"""
import functools
import gc
import math
import os
import re
import signal

import pytest
import torch

import train_gpt
from chaos import RUN, assert_same
from helpers import (CPU, SCRIPT, TECHNIQUES, TINY, gradients_of, logits_of, losses, main,
                     make_dataset, needs_compiler, randn, random_model, random_tokens, randomize,
                     read_run, relative_error, rng, small_config, small_tables, torchrun, train)
from train_gpt import (GPT, TRACKS, AttentionSpec, LossSpec, MuonAdamW, Runtime, Trainer, attend,
                       choose_attention, chunked_loss, generator_of, is_distilled, loss_chunk,
                       make_config, make_mask, peak_flops, start_runtime, training_stages)

DEVICE = "cuda"
# cuBLAS reads it once, at its first call: with it its sums have one order
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
HERE = torch.device(DEVICE)
ROUNDING = 1e-3             # what is left of losses that are summed in another order
COMPILED = ["--compile=true", "--compile_model=true"]
BY_STRINGS = ["--spelling=true", "--split_tokens=0.3", "--row_memory=true"]
on_every_path = pytest.mark.parametrize("path", [
    "sdpa", pytest.param("flex", marks=needs_compiler), "fa3"])


@pytest.fixture(autouse=True)
def as_it_was():
    """Nothing is compiled before a test; signals are handled as before when it is over."""
    torch._dynamo.reset()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch._dynamo.reset()
    gc.collect()


@pytest.fixture
def deterministic():
    """Sums in one order, or an error where an operation has none."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def weights_of_the_cpu(monkeypatch):
    """Members begin with the weights that the CPU's generator gives, wherever they train."""
    init_weights = GPT.init_weights

    def patched(self, seed):
        self.load_state_dict(init_weights(GPT(self.config), seed).state_dict())
        return self

    monkeypatch.setattr(GPT, "init_weights", patched)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The argument for a small dataset."""
    return f"--dataset={make_dataset(tmp_path_factory.mktemp('data') / 'small', tables=True)}"


@functools.cache
def why_no_flash():
    """In a line why FlashAttention 3 does not work here, or ""."""
    runtime = Runtime(device=HERE, dtype=torch.bfloat16)
    choose_attention(runtime, True)
    return "" if runtime.attention == "fa3" else runtime.notes[0]


def skip_without(path, dtype):
    if path == "fa3" and dtype == torch.float32:
        pytest.skip("FlashAttention 3 has no float32")
    if path == "fa3" and why_no_flash():
        pytest.skip(why_no_flash())


def chosen_attention(dtype):
    """What a run whose model is compiled must choose."""
    return "flex" if dtype == torch.float32 or why_no_flash() else "fa3"


def compiled(function):
    """As a run compiles it."""
    return Runtime(device=HERE, compile=True).compiled(function)


# ==== What is chosen ============================================================================
@needs_compiler
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_runtime_of_a_gpu(dtype):
    """bf16 if it is fast, compiled code, and no attention slower than need be."""
    runtime = start_runtime(make_config("mini", dtype=dtype))
    is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    auto = torch.bfloat16 if is_fast else torch.float32
    assert runtime.dtype == (auto if dtype == "auto" else getattr(torch, dtype))
    assert runtime.device == torch.device(DEVICE, 0) and runtime.compile
    assert runtime.attention == chosen_attention(runtime.dtype)
    eager = start_runtime(make_config("mini", dtype="float32", compile=False))
    assert (eager.attention, eager.compile) == ("sdpa", False)


def test_the_generator_of_a_gpu_is_the_one_that_dropout_draws_from():
    runtime = start_runtime(make_config("mini", dtype="float32", compile=False))
    ones = torch.ones(64, device=HERE)
    torch.manual_seed(3)
    torch.rand(5, device=HERE)
    state = generator_of(runtime.device).get_state().to(HERE).cpu()     # as processes gather it
    drawn = torch.dropout(ones, 0.5, True)
    torch.manual_seed(4)
    generator_of(runtime.device).set_state(state)
    assert torch.equal(torch.dropout(ones, 0.5, True), drawn)


# ==== Attention =================================================================================
def slow_attention(q, k, v, window, scale):
    """A query after the other: `window` keys before its own, and its own. [B, T, H, Dh]"""
    rows = []
    for i in range(q.shape[1]):
        seen = slice(max(0, i - window), i + 1)
        scores = scale * torch.einsum("bhd,bjhd->bhj", q[:, i], k[:, seen])
        rows.append(torch.einsum("bhj,bjhd->bhd", scores.softmax(dim=-1), v[:, seen]))
    return torch.stack(rows, dim=1)


def with_gradients(function, inputs, upstream):
    """[result, d/dq, d/dk, d/dv]"""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    result = function(*inputs)
    result.backward(upstream)
    return [result, *(x.grad for x in inputs)]


def assert_attends(path, dtype, width, length, window):
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    scale = 1.3 * width ** -0.5
    *qkv, upstream = (randn(2, length, 2, width, seed=i).to(dtype) for i in range(4))
    expected = with_gradients(
        lambda q, k, v: slow_attention(q, k, v, window, scale),
        [x.double() for x in qkv], upstream.double())
    spec = AttentionSpec(window, make_mask(window, length, HERE, path), None, None, scale, path)
    function = compiled(attend) if path == "flex" else attend
    ours = with_gradients(lambda q, k, v: function(q, k, v, spec),
                          [x.to(HERE) for x in qkv], upstream.to(HERE))
    # a query that sees its own key alone has no gradient: compared with the largest of the three
    scales = [expected[0].abs().max(), *[max(x.abs().max() for x in expected[1:])] * 3]
    for one, reference, largest in zip(ours, expected, scales):
        assert one.dtype == dtype and one.shape == reference.shape
        error = (one.detach().cpu().double() - reference.detach()).abs().max() / largest
        assert error < tolerance, f"window {window} of {length}: {error:.2g}"


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on_every_path
def test_attend_against_a_slow_loop(path, dtype, width):
    skip_without(path, dtype)
    for window in (0, 1, 5, 255, 256, 296):
        assert_attends(path, dtype, width, 256, window)


@pytest.mark.parametrize("length", [64, 200])
@on_every_path
def test_attend_on_rows_that_do_not_fill_a_block(path, length):
    """FlexAttention masks blocks of 128 and has another kernel for fewer queries."""
    skip_without(path, torch.bfloat16)
    for window in (5, length):
        assert_attends(path, torch.bfloat16, 64, length, window)


# ==== The model =================================================================================
# slow rotations, of which some are interpolated and some kept as windows grow
GROWN = dict(rope_base=3.0, window_schedule="0:0.25:0.5,0.4:0.5:1")
ON_EVERY_PATH = {
    "windows, MTP": dict(mtp_weight=0.3),
    "grown windows with YaRN, key offset, XSA, IHA": dict(
        GROWN, rope_fraction=0.5, key_offset=True, xsa=True, iha=True),
    "loops and recurrence, with all of these": dict(
        GROWN, rope_fraction=0.5, key_offset=True, xsa=True, iha=True, mtp_weight=0.3,
        loop_start=1, loop_end=1, loop_count=2, recurrence_from=0.7),
}


def states_and_gradients(model, forward, mtp_hidden):
    """{name: hidden states, those of the MTP block, gradients} of two rows, in the last stage."""
    config = model.config
    device = model.wte.weight.device
    tokens, following = (random_tokens(config, 2, config.seq_len, seed=i).to(device)
                         for i in range(2))
    specs = model.specs(training_stages(config)[-1])
    states = {"hidden": forward(model, tokens, specs)}
    if config.mtp_weight:
        states["ahead"] = mtp_hidden(model, states["hidden"], following, specs)
    sum(logits_of(model, x).square().mean() for x in states.values()).backward()
    results = {**states, **gradients_of(model)}
    return {name: x.detach().cpu().double() for name, x in results.items()}


def distance(ours, reference):
    """Norm of the difference, as a fraction of the reference's."""
    return float((ours - reference).norm() / reference.norm())


@pytest.mark.parametrize("name", ON_EVERY_PATH)
@pytest.mark.parametrize("path, dtype", [
    ("sdpa", torch.float32), pytest.param("flex", torch.float32, marks=needs_compiler),
    pytest.param("fa3", torch.bfloat16, marks=needs_compiler)], ids=str)
def test_paths_of_attention_are_one_model(path, dtype, name):
    """As in a run, compiled but for SDPA, against SDPA in float64 on the CPU.

    In bf16, gradients of single numbers are left out: they are sums that cancel.
    """
    skip_without(path, dtype)
    config = small_config(seq_len=128, model_dim=128, num_layers=3, **ON_EVERY_PATH[name])
    expected = states_and_gradients(random_model(config), GPT.forward, GPT.mtp_hidden)
    model = randomize(GPT(config, dtype, path)).to(HERE).eval()
    functions = [GPT.forward, GPT.mtp_hidden]
    if path != "sdpa":
        functions = [compiled(function) for function in functions]
    ours = states_and_gradients(model, *functions)
    assert set(ours) == set(expected) and ("ahead" in ours) == bool(config.mtp_weight)
    for key, reference in expected.items():
        is_state = key in ("hidden", "ahead")
        if dtype == torch.float32:
            assert distance(ours[key], reference) < 1e-3, key
        elif is_state or reference.ndim > 1:
            assert distance(ours[key], reference) < (0.15 if is_state else 0.5), key


# ==== Loss and optimizer ========================================================================
LOSS_VOCAB, LOSS_PADDED, ROWS = 1000, 1024, 200
NONE = -1e4                 # a logit of what is not there: its p is 0


def naive_loss(hidden, weight, targets, teacher, spec):
    """The loss from whole logits without the padding; a token without a next one does not count.
    What stands earlier in the row, of spec.row tokens, has a logit as well."""
    config, T = spec.config, spec.config.kd_temperature
    counted, tokens = targets[:, 0] >= 0, torch.arange(LOSS_VOCAB).expand(ROWS, -1)
    if spec.row:
        at = torch.arange(ROWS)
        seen = (at[:, None] > at) & (at[:, None] // spec.row == at // spec.row) & counted
        tokens = torch.cat((tokens, torch.where(seen, targets[:, 0], -1)), dim=1)

    def all_logits(h, w):
        z = config.softcap * torch.tanh(h @ w[:LOSS_VOCAB].T / config.softcap)
        return torch.cat((z, torch.where(seen, h @ h.T / h.shape[1] ** 0.5, NONE)),
                         dim=1) if spec.row else z

    logits, taught = all_logits(hidden, weight), all_logits(*teacher)
    logp = logits.log_softmax(dim=1)
    loss = 0
    for weight_of_it, column in zip(spec.target_weights.tolist(), targets.T):
        there = counted & (column >= 0)
        right = torch.where(tokens == column[:, None], logp, NONE)[there]
        loss = loss - (1 - spec.alpha) * weight_of_it * right.logsumexp(dim=1).sum()
    log_p, log_q = ((x / T).log_softmax(dim=1) for x in (logits, taught))
    kl = (log_q.exp() * (log_q - log_p)).sum(dim=1)[counted].sum()
    return loss + spec.alpha * T ** 2 * kl


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)],
                         ids=["float32", "bfloat16"])
@pytest.mark.parametrize("row", [0, 8], ids=["", "memory"])
@needs_compiler
def test_compiled_loss_with_a_teacher_equals_naive_autograd(row, dtype, tolerance):
    """In chunks, the last of which is smaller; two targets, some of which are missing."""
    hidden, taught = (randn(ROWS, 64, seed=i).to(dtype) for i in range(2))
    weight, teacher = (randn(LOSS_PADDED, 64, seed=i).to(dtype) / 2 for i in range(2, 4))
    targets = torch.randint(0, LOSS_VOCAB, (ROWS, 2), generator=rng(4))
    targets[::5] = -1
    targets[1::5, 1] = -1
    config = small_config(vocab_size=LOSS_VOCAB, kd_temperature=2.0, loss_chunk=64)
    spec = LossSpec(torch.tensor([1.0, 0.5]), 0.4, config, row)

    def gradients(function, hidden, weight):
        hidden, weight = (x.clone().requires_grad_() for x in (hidden, weight))
        loss = function(hidden, weight)
        (loss / ROWS).backward()
        return [x.detach().cpu().double() for x in (loss, hidden.grad, weight.grad)]

    expected = gradients(
        lambda h, w: naive_loss(h, w, targets, (taught.double(), teacher.double()), spec),
        hidden.double(), weight.double())
    there = spec._replace(target_weights=spec.target_weights.to(HERE))
    ours = gradients(
        lambda h, w: chunked_loss(h, w, targets.to(HERE), (taught.to(HERE), teacher.to(HERE)),
                                  there, compiled(loss_chunk))[0],
        hidden.to(HERE), weight.float().to(HERE))
    for one, reference in zip(ours, expected, strict=True):
        assert relative_error(one, reference) < tolerance


def weights_after_three_steps(device, dtype, cautious):
    """Of a model of three layers with every technique; dtype: of weights and products."""
    config = small_config(num_layers=3, grad_clip=2.0, cautious=cautious, spelling=True,
                          **TECHNIQUES)
    model = randomize(GPT(config)).to(device, dtype)
    optimizer = MuonAdamW(model.named_parameters(), config, Runtime(device=device, dtype=dtype),
                          small_tables())
    for step in range(3):
        for i, p in enumerate(model.parameters()):
            p.grad = randn(*p.shape, seed=100 * step + i).to(device, dtype)
        optimizer.step(1 - step / 4, 1.0, 0.9)
    return {name: p.detach().cpu() for name, p in model.named_parameters()}


# in float32 an update near 0 may have either sign, and cautious decay depends on it
@pytest.mark.parametrize("dtype, cautious, tolerance", [
    (torch.float64, True, 1e-9), (torch.float32, False, 1e-3)], ids=["float64", "float32"])
def test_optimizer_makes_the_steps_of_the_cpu(dtype, cautious, tolerance):
    expected = weights_after_three_steps(CPU, dtype, cautious)
    for name, p in weights_after_three_steps(HERE, dtype, cautious).items():
        assert relative_error(p, expected[name]) < tolerance, name


# ==== Whole runs ================================================================================
FEWER_STAGES = {"two_hour": ["--window_schedule=0:0.25:0.5,0.5:0.5:1"]}     # to compile


@pytest.mark.parametrize("track", TRACKS)
@needs_compiler
def test_a_run_of_every_track(track, tmp_path):
    """A toy with a teacher, in bf16 and compiled."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    torch._dynamo.utils.counters.clear()
    run = train(tmp_path, f"--track={track}", f"--device={DEVICE}", "--dtype=bfloat16", *COMPILED,
                "--num_layers=2", "--loop_start=1", "--loop_end=1", "--num_epochs=2",
                "--num_models=2", "--kd_alpha=0.5", "--kd_from=2", *FEWER_STAGES.get(track, []))
    attention = chosen_attention(torch.bfloat16)
    assert f"torch.bfloat16, attention {attention}, compile on" in run.log
    assert ("FlashAttention 3 fails" in run.console) == (attention != "fa3")
    assert run.result["compile_seconds"] > 0
    if attention == "flex":         # nothing fell back to eager mode
        assert not torch._dynamo.utils.counters["graph_break"]
    everything = [run.result["val_loss"], run.result["holdout_loss"]]
    everything += [m[key] for m in run.result["members"] for key in
                   ("train_loss", "selection_loss", "val_loss", "holdout_loss")]
    assert all(loss < math.log(2048) for loss in everything)        # not if it is not a number
    assert [m["kl"] > 0 for m in run.steps] == [m["member"] == 2 for m in run.steps]
    if DEVICE == "cuda":
        assert run.result["hardware"].endswith(torch.cuda.get_device_name(HERE))
        total = torch.cuda.get_device_properties(HERE).total_memory
        assert 2 ** 20 < run.result["peak_memory_bytes"] < total / 4
        for member in run.result["members"]:        # a toy's may be rounded to 0
            assert 0 <= member["mfu"] < 1 if peak_flops(HERE) else member["mfu"] is None


SAME = {        # no dropout, and no step that hangs on a sign
    "cpu": ["--track=cpu", "--num_models=2", "--kd_from=2"],
    "limited": ["--track=limited", "--num_layers=3", "--batch_rows=8", "--num_epochs=2"],
    "tiny": ["--track=tiny", "--batch_rows=8", "--num_epochs=2"],
    "by strings": ["--track=cpu", "--num_models=2", "--kd_from=2", *BY_STRINGS],
}


@pytest.mark.parametrize("name", SAME)
def test_float32_run_has_the_losses_of_the_cpu(name, small, tmp_path, weights_of_the_cpu):
    arguments = [*SAME[name], small, "--vocab_size=100", "--train_tokens=3000",
                 "--selection_tokens=300", "--eval_tokens=0", "--final_mixture=learned",
                 "--dropout=0", "--cautious=false"]
    (tmp_path / "cpu").mkdir()
    (tmp_path / "gpu").mkdir()
    reference = train(tmp_path / "cpu", *arguments, "--device=cpu")
    run = train(tmp_path / "gpu", *arguments, f"--device={DEVICE}")
    assert "torch.float32, attention sdpa, compile off" in run.log
    assert len(run.steps) == len(reference.steps) > 5
    for ours, theirs in zip(run.steps, reference.steps):
        for key in ("train_loss", "kl"):
            assert ours[key] == pytest.approx(theirs[key], abs=ROUNDING)
    for ours, theirs in zip(losses(run)[1], losses(reference)[1]):
        assert ours == pytest.approx(theirs, abs=ROUNDING)
    assert run.result["val_loss"] == pytest.approx(reference.result["val_loss"], abs=ROUNDING)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("changes", [[], [*COMPILED]], ids=["eager", "compiled"])
def test_two_gpus_train_the_members_of_one(changes, small, tmp_path):
    arguments = [*TINY, f"--device={DEVICE}", "--track=limited", small, *changes,
                 "--vocab_size=100", "--train_tokens=3000", "--selection_tokens=300",
                 "--eval_tokens=0", "--dropout=0", "--cautious=false", "--batch_rows=16",
                 "--seq_len=32", "--num_layers=2", "--loop_start=1", "--loop_end=1",
                 "--num_epochs=2", "--num_models=2", "--kd_alpha=0.5"]
    (tmp_path / "one").mkdir()
    one = train(tmp_path / "one", *arguments)
    done = torchrun(2, SCRIPT, *arguments, f"--runs_dir={tmp_path}", "--run_id=two", timeout=300)
    assert done.returncode == 0, done.stderr
    two = read_run(tmp_path / "two", done.stdout)
    assert two.result["processes"] == 2 and "2 process(es)" in two.console
    assert [m["train_loss"] for m in two.steps] == pytest.approx(
        [m["train_loss"] for m in one.steps], abs=ROUNDING)
    for ours, theirs in zip(losses(two)[1], losses(one)[1], strict=True):
        assert ours == pytest.approx(theirs, abs=ROUNDING)


# ==== Stopped, and gone on with =================================================================
def at_reading(count, action, monkeypatch):
    """`action()` happens before the count-th reading of the loss from now on."""
    left = [count]
    metrics = train_gpt.Log.metrics

    def patched(self, **numbers):
        left[0] -= "step" in numbers
        if left[0] == 0 and "step" in numbers:
            action()
        metrics(self, **numbers)

    monkeypatch.setattr(train_gpt.Log, "metrics", patched)


def arguments_of(runs, data, *changes):
    """Of a run in fp32 that has two members with dropout, saves a state at each step, and is in
    the folder `run`."""
    return [*RUN, f"--device={DEVICE}", data, f"--runs_dir={runs}", "--num_models=2",
            "--log_steps=1", *changes]


@pytest.mark.parametrize("changes", [
    ["--compile=false"], ["--compile=false", *BY_STRINGS],
    pytest.param(COMPILED, marks=needs_compiler)], ids=["eager", "by strings", "compiled"])
def test_a_run_that_is_stopped_ends_as_one_that_is_not(changes, small, tmp_path, monkeypatch,
                                                       deterministic):
    """Bit for bit, with dropout: within the second member, after one that is averaged."""
    assert main(*arguments_of(tmp_path / "whole", small, *changes))[0] == 0
    stopped = arguments_of(tmp_path / "stopped", small, *changes)
    readings = (tmp_path / "whole/run/metrics.jsonl").read_text(encoding="utf-8")
    first = len(re.findall('"member": 1, "step"', readings))
    with monkeypatch.context() as patch:
        at_reading(first + 4, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        code, _, err = main(*stopped)
    assert code == 128 + signal.SIGTERM and err.startswith("stopped   member 2 after step 4"), err
    assert (tmp_path / "stopped/run/state.safetensors").exists()
    torch.manual_seed(0)            # what is drawn comes from the state
    code, out, err = main(*stopped)
    assert (code, err) == (0, "") and "resumed   member 2 after step 4" in out
    assert_same(tmp_path / "whole/run", tmp_path / "stopped/run")
    assert read_run(tmp_path / "stopped/run").result["overrides"]["dropout"] > 0


# ==== Memory ====================================================================================
def no_more_memory(rows, monkeypatch):
    """From now on the loss of more than `rows` rows runs out of memory."""
    main_loss = Trainer.main_loss

    def patched(self, hidden, inputs, *arguments):
        if len(inputs) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return main_loss(self, hidden, inputs, *arguments)

    monkeypatch.setattr(Trainer, "main_loss", patched)


def fill_memory():
    """From now on PyTorch may allocate no more of this GPU than it has."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(HERE).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved(HERE) / total)


@pytest.mark.parametrize("is_real", [False, True], ids=["said", "real"])
def test_a_run_that_is_out_of_memory_goes_on_with_smaller_micro_batches(
        is_real, small, tmp_path, monkeypatch):
    """From its last state, to the losses of a run that had them from the beginning."""
    # rows whose logits and activations cannot hide in what is left of a small block
    changes = ["--compile=false", "--dropout=0", "--cautious=false", "--seq_len=128",
               "--model_dim=128", "--train_tokens=2600", "--num_epochs=6"]
    large = arguments_of(tmp_path / "run", small, *changes, "--device_batch_size=8")
    fewer = arguments_of(tmp_path / "run", small, *changes, "--device_batch_size=2")
    whole = arguments_of(tmp_path / "whole", small, *changes, "--device_batch_size=2")
    with monkeypatch.context() as patch:
        action = fill_memory if is_real else functools.partial(no_more_memory, 2, patch)
        at_reading(4, action, patch)
        try:
            code, out, err = main(*large)
        finally:
            if is_real:
                torch.cuda.set_per_process_memory_fraction(1.0)
    assert code == 2 and re.fullmatch("error: out of memory; lower --device_batch_size.*\n", err)
    assert "micro-batches of 8 row(s)" in out
    with monkeypatch.context() as patch:
        if not is_real:
            no_more_memory(2, patch)
        code, out, err = main(*fewer)
    assert (code, err) == (0, "") and re.search("^resumed   member 1 after step", out, re.M)
    assert "micro-batches of 2 row(s)" in out
    assert main(*whole)[0] == 0
    ours, theirs = (read_run(tmp_path / name / "run") for name in ("run", "whole"))
    assert [(m["member"], m["step"]) for m in ours.steps] == [
        (m["member"], m["step"]) for m in theirs.steps]
    assert [m["train_loss"] for m in ours.steps] == pytest.approx(
        [m["train_loss"] for m in theirs.steps], abs=ROUNDING)
    assert ours.result["val_loss"] == pytest.approx(theirs.result["val_loss"], abs=ROUNDING)


def measured_peak(config):
    """(bytes that a step of the last member allocates at most, dtype)"""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(HERE)
    runtime = start_runtime(config)
    trainer = Trainer(config, runtime)
    trainer.start_member(1, 1)
    distill = is_distilled(config, config.num_models)
    stream = random_tokens(config, config.batch_rows, config.seq_len + 1)
    for _ in range(2):          # in the first, compilers try and measure
        torch.cuda.reset_peak_memory_stats(HERE)
        trainer.gradients(stream[:, :-1], stream[:, 1:].clone(), 0.99, distill)
        trainer.optimizer.step(1.0, 1.0, 0.95)
    runtime.synchronize()
    return torch.cuda.max_memory_allocated(HERE) - before, runtime.dtype


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=needs_compiler)],
                         ids=["eager", "compiled"])
@pytest.mark.parametrize("changes", [
    dict(), dict(mtp_weight=0.3, iha=True, meta_lr=0.5, meta_rows=8, kd_alpha=0)],
    ids=["teacher", "MTP, IHA, meta-gradient"])
def test_memory_is_what_is_planned(changes, is_compiled):
    """The plan is one of eager mode: compiled code keeps less."""
    plan = pytest.importorskip("plan")
    config = make_config("mini", **{**dict(
        device=DEVICE, compile=is_compiled, model_dim=512, num_heads=8, num_layers=8,
        seq_len=512, batch_rows=16, device_batch_size=8, num_models=2, dropout=0.1,
        vocab_size=8192, loss_chunk=256, spelling=False, split_tokens=0, row_memory=False),
        **changes})
    measured, dtype = measured_peak(config)
    planned = plan.peak_bytes(config, 1, dtype)
    assert 0.8 < planned / measured < 2.5, f"planned {planned:,}, measured {measured:,}"
