"""The transformer against slow references, path by path of its attention, and its stages.

    python -m pytest tests/test_model.py

The references are helpers.SlowModel and loops of this file, in float64, from the formulas.
"""
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import flex_attention as flex_module
from torch.utils.flop_counter import FlopCounterMode

import train_gpt
from helpers import (CPU, SlowModel, assert_causal, gradients_of, logits_of, needs_compiler, randn,
                     random_model, random_tokens, randomize, relative_error, rng, small_config)
from train_gpt import (GPT, AttentionSpec, attend, flops_per_token, layer_order, layer_windows,
                       make_mask, stage_at, training_stages, yarn)

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

T = 12                      # tokens of a row of small_config
SSSL = (6, 6, 6, 12)        # keys before their own that queries of its four layers see
ANGLES = 2e-5               # relative error that is left by the rotation's angles, which are fp32
LOOP = dict(loop_start=1, loop_end=2, loop_count=2)
# slow rotations, of which some are interpolated and some kept as windows grow
GROWN = dict(rope_base=3.0, window_schedule="0:0.25:0.5,0.4:0.5:1")
EVERYTHING = dict(**LOOP, rope_fraction=0.5, key_offset=True, xsa=True, iha=True, mtp_weight=0.3,
                  recurrence_from=0.7, window_schedule="0:0.125:0.25,0.2:0.25:0.5,0.4:0.5:1")


# ==== Paths of attention ========================================================================
def documented_flash_attention(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1)):
    """flash_attn_func of FlashAttention 3, as its documentation has it. q, k, v [B, T, H, Dh].

    Query i sees keys from i - left to i + right, both included (-1: as far as there are), and,
    if `causal`, none behind its own.
    """
    left, right = window_size
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])[None, :]
    is_seen = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        is_seen &= distance <= left
    if right >= 0:
        is_seen &= distance >= -right
    if causal:
        is_seen &= distance >= 0
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    weights = scores.masked_fill(~is_seen, -torch.inf).softmax(dim=-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def accept(*tensors):
    """In place of FlexAttention's check of devices: eager mode has gradients on a CPU as well."""


@pytest.fixture
def every_path(monkeypatch):
    """FlexAttention with gradients on a CPU, and a module that stands for FlashAttention 3."""
    torch._dynamo.reset()               # eager FlexAttention counts graphs of its own
    monkeypatch.setattr(flex_module, "_validate_device", accept)
    monkeypatch.setattr(train_gpt, "flash_attn_func", documented_flash_attention)


def spec_of(path, window, length, scale):
    return AttentionSpec(window, make_mask(window, length, CPU, path), None, None, scale, path)


@pytest.mark.parametrize("path", ["sdpa", "flex", "fa3"])
@pytest.mark.parametrize("window, scale", [(0, 0.8), (1, 0.5), (2, 0.8), (5, 0.5), (14, 0.5), (15, 0.8), (16, 0.5),
                                           (40, 0.8)])
def test_attend_against_a_slow_loop(path, window, scale, every_path):
    """A query sees `window` keys before its own, and its own."""
    B, length, H, d = 2, 16, 3, 4
    q, k, v = (randn(B, length, H, d, seed=i) for i in range(3))
    expected = np.zeros((B, length, H, d))
    for b, i, h in np.ndindex(B, length, H):
        seen = range(max(0, i - window), i + 1)
        weights = np.array([np.exp(float(q[b, i, h] @ k[b, j, h]) * scale) for j in seen])
        expected[b, i, h] = weights / weights.sum() @ v[b, list(seen), h].numpy()
    assert relative_error(attend(q, k, v, spec_of(path, window, length, scale)), expected) < 1e-12


def test_flash_attention_may_return_its_normalizers_as_well(every_path, monkeypatch):
    q, k, v = (randn(1, 5, 2, 4, seed=i) for i in range(3))
    spec = spec_of("fa3", 3, 5, 0.5)
    expected = attend(q, k, v, spec)
    monkeypatch.setattr(train_gpt, "flash_attn_func", lambda *arguments, **options: (
        documented_flash_attention(*arguments, **options), None))
    assert torch.equal(attend(q, k, v, spec), expected)


ON_EVERY_PATH = {
    "windows": dict(),
    "no windows": dict(window_pattern="L"),
    "grown windows with YaRN, key offset": dict(GROWN, rope_fraction=0.5, key_offset=True),
    "XSA, IHA, MTP": dict(xsa=True, iha=True, mtp_weight=0.3),
    "everything": EVERYTHING,
}


@pytest.mark.parametrize("path", ["flex", "fa3"])
@pytest.mark.parametrize("name", ON_EVERY_PATH)
def test_paths_of_attention_are_one_model(path, name, every_path):
    """Hidden states, the MTP block's, and all gradients, in the first stage and in the last."""
    config = small_config(**ON_EVERY_PATH[name])
    tokens = random_tokens(config, 2, T)
    following = random_tokens(config, 2, T, seed=1)
    stages = training_stages(config)
    for stage in {stages[0], stages[-1]}:
        results = []
        for attention in ("sdpa", path):
            model = random_model(config, attention=attention)
            specs = model.specs(stage)
            assert {spec.path for spec in (*specs.attention, specs.mtp)} == {attention}
            states = [model(tokens, specs)]
            if config.mtp_weight:
                states.append(model.mtp_hidden(states[0], following, specs))
            sum(logits_of(model, x).square().sum() for x in states).backward()
            results.append([*states, *gradients_of(model).values()])
        for ours, reference in zip(*results, strict=True):
            assert relative_error(ours, reference) < 1e-10


@pytest.mark.parametrize("attention", ["sdpa", "flex"])
def test_all_batches_and_members_of_a_stage_share_a_graph(attention, every_path):
    """Traced as one graph with Specs as arguments; stages differ, batches and weights do not."""
    config = small_config(num_layers=2, window_pattern="SL", mtp_weight=0.3, rope_fraction=0.5,
                          key_offset=True, recurrence_from=0.7, **GROWN)
    model = random_model(config, attention=attention)
    counters = {function: CompileCounter() for function in (GPT.forward, GPT.mtp_hidden)}
    forward, mtp_hidden = (
        torch.compile(function, dynamic=False, backend=counter, fullgraph=True)
        for function, counter in counters.items())
    stages = training_stages(config)
    for count, stage in enumerate((stages[0], stages[-1]), 1):
        specs = model.specs(stage)
        for seed in range(2):
            randomize(model, seed)
            tokens = random_tokens(config, 2, T, seed=seed)
            hidden = model(tokens, specs)
            ahead = model.mtp_hidden(hidden, tokens, specs)
            assert relative_error(forward(model, tokens, specs), hidden) < 1e-12
            assert relative_error(mtp_hidden(model, hidden, tokens, specs), ahead) < 1e-12
            assert {counter.frame_count for counter in counters.values()} == {count}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@needs_compiler
def test_inductor_computes_what_eager_does():
    """A whole model and its gradients, compiled to machine code."""
    torch._dynamo.reset()
    config = small_config(num_layers=1, loop_count=2, rope_fraction=0.5, key_offset=True, xsa=True,
                          iha=True)
    tokens = random_tokens(config, 2, T)
    results = []
    for function in (GPT.forward, torch.compile(GPT.forward, dynamic=False, fullgraph=True)):
        model = randomize(GPT(config))
        logits_of(model, function(model, tokens, model.specs())).square().mean().backward()
        results.append(gradients_of(model))
    for name, reference in results[0].items():
        assert relative_error(results[1][name], reference) < 1e-3, name


# ==== The model against a slow reference ========================================================
# changes of small_config, and what SlowModel needs to know of its last stage
MODELS = {
    "plain": (dict(), {}),
    "one layer": (dict(num_layers=1), dict(windows=(12,))),
    "five layers, three looped": (
        dict(num_layers=5, loop_start=1, loop_end=3, loop_count=2),
        dict(windows=(6, 6, 6, 12, 12), loops=2)),
    "all layers looped": (dict(loop_start=0, loop_end=3, loop_count=2), dict(loops=2)),
    "one layer looped": (dict(loop_start=2, loop_end=2, loop_count=3), dict(loops=3)),
    "two heads, other frequencies": (dict(num_heads=2, rope_base=100.0), {}),
    "LS, tight softcap": (dict(window_pattern="LS", softcap=3.0), dict(windows=(12, 6, 12, 12))),
    "full windows, no softcap": (dict(window_pattern="L", softcap=0.0), dict(windows=(12,) * 4)),
    "no skips": (dict(unet=False), {}),
    "no r": (dict(resid_init=0.0), {}),
    "no a": (dict(x0_init=0.0), {}),
    "no value projections": (dict(value_projections=False), {}),
    "no gates": (dict(attn_gate=False), {}),
    "no QK norm": (dict(qk_norm=False), {}),
    "nothing": (
        dict(unet=False, resid_init=0.0, x0_init=0.0, value_projections=False, attn_gate=False,
             qk_norm=False, softcap=0.0, window_pattern="L", mtp_weight=0.0),
        dict(windows=(12,) * 4)),
    "half RoPE": (dict(rope_fraction=0.5), {}),
    "half RoPE, key offset": (dict(rope_fraction=0.5, key_offset=True), {}),
    "XSA": (dict(xsa=True), {}),
    "IHA": (dict(iha=True), {}),
    "recurrence": (dict(recurrence_from=0.7), dict(passes=2)),
    "YaRN": (GROWN, dict(growths=((6, 12),))),
    "everything": (EVERYTHING, dict(loops=2, passes=2, growths=((3, 6), (6, 12)))),
}


@pytest.mark.parametrize("name", MODELS)
def test_model_equals_slow_reference(name):
    """Hidden states, logits and the MTP block of two rows."""
    changes, known = MODELS[name]
    config = small_config(**{"mtp_weight": 0.3, **changes})
    model = random_model(config)
    slow = SlowModel(model, **{"windows": SSSL, **known})
    specs = model.specs()
    tokens = random_tokens(config, 2, T)
    following = random_tokens(config, 2, T, seed=1)
    with torch.no_grad():
        hidden = model(tokens, specs)
        logits = logits_of(model, hidden)
    assert logits.shape == (2, T, config.vocab_size)        # without the padding
    for row in range(2):
        expected = slow.hidden(tokens[row])
        assert relative_error(hidden[row], expected) < ANGLES
        assert relative_error(logits[row], slow.logits(expected)) < ANGLES
        if config.mtp_weight and not config.key_offset:
            ahead = model.mtp_hidden(hidden, following, specs)
            expected = slow.mtp_hidden(expected, following[row])
            assert relative_error(ahead[row], expected) < ANGLES


def test_first_stage_of_grown_windows_equals_slow_reference():
    """Its L window is half a row: keys are offset there, and not in the MTP block's whole row."""
    config = small_config(**GROWN, rope_fraction=0.5, key_offset=True, mtp_weight=0.3)
    model = random_model(config)
    specs = model.specs(training_stages(config)[0])
    slow = SlowModel(model, (3, 3, 3, 6))
    tokens, following = random_tokens(config, 1, T), random_tokens(config, 1, T, seed=1)
    hidden = model(tokens, specs)
    expected = slow.hidden(tokens[0])
    assert relative_error(hidden[0], expected) < ANGLES
    ahead = model.mtp_hidden(hidden, following, specs)
    assert relative_error(ahead[0], slow.mtp_hidden(expected, following[0])) < ANGLES


@pytest.mark.parametrize("name", MODELS)
def test_model_is_causal(name):
    config = small_config(**{"mtp_weight": 0.3, **MODELS[name][0]})
    model = random_model(config)
    specs = model.specs()
    tokens = random_tokens(config, 1, T)
    assert_causal(lambda x: model(x, specs), tokens)
    if config.mtp_weight:
        with torch.no_grad():
            hidden = model(tokens, specs)
        assert_causal(lambda x: model.mtp_hidden(hidden, x, specs), tokens)
        assert_causal(lambda x: model.mtp_hidden(model(x, specs), tokens, specs), tokens)


def test_rows_shorter_than_seq_len():
    """Sampling runs short rows: windows stay those of seq_len, positions begin at 0."""
    config = small_config(**LOOP)
    model = random_model(config)
    tokens = random_tokens(config, 1, 8)
    expected = SlowModel(model, SSSL, loops=2).hidden(tokens[0])
    for specs in (None, model.specs(length=8)):
        assert relative_error(model(tokens, specs)[0], expected) < ANGLES


def test_a_forward_without_specs_is_in_the_last_stage():
    model = random_model(small_config(**EVERYTHING))
    tokens = random_tokens(model.config, 2, T)
    assert torch.equal(model(tokens), model(tokens, model.specs()))
    assert not torch.allclose(model(tokens), model(
        tokens, model.specs(training_stages(model.config)[0])))


@pytest.mark.parametrize("loops, passes", [(1, 1), (2, 1), (5, 1), (1, 3), (2, 2)])
def test_a_stage_says_how_often_layers_and_network_run(loops, passes):
    config = small_config(**LOOP)
    model = random_model(config)
    tokens = random_tokens(config, 1, T)
    stage = training_stages(config)[0]._replace(loops=loops, passes=passes)
    expected = SlowModel(model, SSSL, loops, passes).hidden(tokens[0])
    assert relative_error(model(tokens, model.specs(stage))[0], expected) < ANGLES


def test_key_offset_is_of_channels_that_do_not_rotate_and_of_long_windows_only():
    """Channel i pairs with i + Dh / 2: half RoPE of 12 channels lets 3, 4, 5, 9, 10, 11 stand."""
    specs = random_model(small_config(rope_fraction=0.5, key_offset=True)).specs()
    *short, long = specs.attention
    assert long.from_before.nonzero().flatten().tolist() == [3, 4, 5, 9, 10, 11]
    assert all(spec.from_before is None for spec in short)
    cos, sin = long.rope
    assert (cos[:, :, 3:] == 1).all() and (sin[:, :, 3:] == 0).all()
    assert (sin[1:, :, :3] != 0).all()


def test_scale_of_attention():
    """1 / sqrt(width of a head) in every layer; YaRN raises it by 0.2 ln(new / old) a growth."""
    for changes, factor in ((dict(), 1.0), (GROWN, 1 + 0.2 * math.log(2))):
        specs = random_model(small_config(**changes)).specs()
        for spec in (*specs.attention, specs.mtp):
            assert spec.scale == pytest.approx(factor * 12 ** -0.5, rel=1e-12)


def test_first_pass_of_the_recurrence_has_no_gradient():
    """The gradient is that of the second pass alone, started from a constant."""
    model = random_model(small_config(recurrence_from=0.7))
    tokens = random_tokens(model.config, 2, T)
    specs = model.specs()
    assert specs.passes == 2
    logits_of(model, model(tokens, specs)).square().sum().backward()
    ours = gradients_of(model)
    model.zero_grad()
    with torch.no_grad():
        first = model(tokens, specs._replace(passes=1))
    x0 = F.rms_norm(model.wte(tokens), (48,))
    second = F.rms_norm(model.trunk(first, x0, specs), (48,))
    logits_of(model, second).square().sum().backward()
    for name, gradient in gradients_of(model).items():
        assert relative_error(ours[name], gradient) < 1e-9, name


def test_activations_have_the_dtype_and_weights_are_fp32():
    model = randomize(GPT(small_config(**EVERYTHING), torch.bfloat16))
    tokens = random_tokens(model.config, 2, T)
    specs = model.specs()
    hidden = model(tokens, specs)
    ahead = model.mtp_hidden(hidden, tokens, specs)
    logits = logits_of(model, ahead)
    assert (hidden.dtype, ahead.dtype, logits.dtype) == (*[torch.bfloat16] * 2, torch.float32)
    logits.sum().backward()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


# ==== Techniques that are off ===================================================================
# field: its value when on, when off, the parameters that it then lacks, and what they are where
# the technique does nothing
TECHNIQUES = {
    "resid_init": (1.0, 0.0, "resid_lambdas", 1.0),
    "x0_init": (0.1, 0.0, "x0_lambdas", 0.0),
    "unet": (True, False, "skip_lambdas", 0.0),
    "value_projections": (True, False, r"value_projs\.\d\.weight|.*value_gate\.weight", 0.0),
    "attn_gate": (True, False, r".*attn\.gate\.weight", 0.0),      # lets half of a head through
    "xsa": (True, False, r".*attn\.xsa", 0.0),
    "iha": (True, False, r".*attn\.mix", torch.eye(4)),
    "mtp_weight": (0.3, 0.0, r"mtp_(proj|block)\..*", 0.0),
    "key_offset": (True, False, None, 0.0),                         # no channel stands still
    "stochastic_depth": (0.9, 0.0, None, 0.0),                      # evaluation keeps all blocks
    "dropout": (0.5, 0.0, None, 0.0),
    "loop_count": (2, 1, None, 0.0),                                # in a stage without loops
}


@pytest.mark.parametrize("field", TECHNIQUES)
def test_a_technique_that_is_off_leaves_exactly_the_model_without(field):
    """Its parameters are not there, and the model is that with neutral ones, bit for bit."""
    value_on, value_off, pattern, neutral = TECHNIQUES[field]
    on = random_model(small_config(**{field: value_on}))
    off = random_model(small_config(**{field: value_off}))
    lost = set(on.state_dict()) - set(off.state_dict())
    assert lost == {name for name in on.state_dict() if re.fullmatch(pattern or "", name)}
    assert bool(lost) == bool(pattern)
    if neutral is None:
        return                  # no neutral parameters: the slow reference is the test
    with torch.no_grad():
        for name in lost:
            p = on.get_parameter(name)
            p.copy_(torch.as_tensor(neutral).expand_as(p))
        off.load_state_dict({name: p for name, p in on.state_dict().items() if name not in lost})
        for block in off.blocks if field == "attn_gate" else ():
            block.attn.proj.weight.mul_(0.5)
        tokens = random_tokens(on.config, 2, T)
        stage = training_stages(off.config)[-1]
        assert torch.equal(on(tokens, on.specs(stage)), off(tokens, off.specs(stage)))


# ==== Randomness ================================================================================
def test_stochastic_depth_against_slow_reference(monkeypatch):
    """Block l is skipped with probability p l / (L - 1), drawn at each call; nothing is scaled."""
    model = random_model(small_config(**LOOP, stochastic_depth=0.6)).train()
    draws = torch.rand(100, generator=rng(3)).tolist()
    tokens = random_tokens(model.config, 1, T)
    order = (1, 2, 1, 2, 3)         # layer 0 is always kept
    sizes = []

    def next_draw(*size, **options):
        sizes.append(size)
        return torch.tensor(next(numbers))

    monkeypatch.setattr(torch, "rand", next_draw)
    outcomes = set()
    for trial in range(4):
        mine = draws[5 * trial:5 * trial + 5]
        numbers = iter(mine)
        kept = (True, *(u >= 0.6 * layer / 3 for u, layer in zip(mine, order)))
        outcomes.add(kept)
        expected = SlowModel(model, SSSL, loops=2, kept=iter(kept)).hidden(tokens[0])
        with torch.no_grad():
            assert relative_error(model(tokens)[0], expected) < ANGLES
    assert len(outcomes) > 1 and sizes == [((),)] * 20      # one number a block call


@pytest.mark.parametrize("draw, is_kept", [(0.79, False), (0.81, True)])
def test_stochastic_depth_of_the_mtp_block(monkeypatch, draw, is_kept):
    """It counts as layer L: skipped with probability p L / (L - 1), 0.6 * 4 / 3 here."""
    model = random_model(small_config(stochastic_depth=0.6, mtp_weight=0.3)).train()
    tokens = random_tokens(model.config, 1, T)
    following = random_tokens(model.config, 1, T, seed=1)
    specs = model.specs()
    hidden = model.eval()(tokens, specs)
    model.train()
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.tensor(draw))
    rows = torch.cat((hidden, F.rms_norm(model.wte(following), (48,))), dim=-1)
    x = rows @ model.mtp_proj.weight.T
    y = model.mtp_block(x, None, specs.mtp) if is_kept else x
    expected = F.rms_norm(y, (48,))
    assert relative_error(model.mtp_hidden(hidden, following, specs), expected) < 1e-12


@pytest.mark.parametrize("in_mlp", [True, False])
def test_dropout_is_behind_both_output_projections(in_mlp):
    """x + m1 attn(norm(x)), then x + m2 mlp(norm(x)); m is 0 with probability p, else 1/(1-p)."""
    model = random_model(small_config(dropout=0.25, mlp_dropout=in_mlp)).train()
    block = model.blocks[0]
    spec = model.specs().attention[0]
    x = randn(2, T, 48)

    def expected(masks):
        middle = x + masks[0] * block.attn(F.rms_norm(x, (48,)), None, spec)
        return middle + masks[1] * block.mlp(F.rms_norm(middle, (48,)))

    torch.manual_seed(3)
    ours = block(x, None, spec)
    torch.manual_seed(3)
    rates = (0.25, 0.25 if in_mlp else 0.0)
    masks = [F.dropout(torch.ones_like(x), rate) for rate in rates]
    assert torch.allclose(ours, expected(masks), rtol=1e-9)
    for mask, rate in zip(masks, rates):
        assert (mask == 0).double().mean() == pytest.approx(rate, abs=0.05)
        assert torch.allclose(mask[mask > 0], mask.new_tensor(1 / (1 - rate)))
    block.eval()
    assert torch.allclose(block(x, None, spec), expected((1, 1)), rtol=1e-9)


# ==== Stages ====================================================================================
@pytest.mark.parametrize("changes, short, long, windows", [
    (dict(num_layers=6), 0.5, 1.0, (6, 6, 6, 12, 6, 12)),
    (dict(window_pattern="S"), 0.5, 1.0, (6, 6, 6, 12)),        # the last is long
    (dict(window_pattern="LS"), 0.5, 1.0, (12, 6, 12, 12)),
    (dict(window_pattern="L"), 0.5, 1.0, (12, 12, 12, 12)),
    (dict(num_layers=5), 0.25, 0.75, (3, 3, 3, 9, 9)),
    (dict(window_pattern="S"), 0.01, 0.5, (1, 1, 1, 6))], ids=str)      # itself at least
def test_windows_by_layer(changes, short, long, windows):
    assert layer_windows(small_config(**changes), short, long) == windows


@pytest.mark.parametrize("start, end, count, order", [
    (0, 0, 1, "012345"), (2, 3, 2, "01232345"), (2, 3, 3, "0123232345"), (0, 1, 2, "01012345"),
    (4, 5, 3, "0123454545"), (0, 5, 2, "012345012345"), (3, 3, 4, "012333345")])
def test_layer_order(start, end, count, order):
    config = small_config(num_layers=6, loop_start=start, loop_end=end, loop_count=count)
    assert "".join(map(str, layer_order(config, count))) == order
    assert layer_order(config, 1) == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("changes, stages", [
    (dict(), [(0, 1, 1, SSSL, ())]),
    (dict(loop_count=3, loop_from_epoch=0), [(0, 3, 1, SSSL, ())]),
    (dict(loop_count=3, loop_from_epoch=1), [(0, 1, 1, SSSL, ()), (0.5, 3, 1, SSSL, ())]),
    (dict(loop_count=1, loop_from_epoch=1), [(0, 1, 1, SSSL, ())]),
    (dict(loop_count=3, loop_from_epoch=1, recurrence_from=0.7,
          window_schedule="0:0.25:0.5,0.25:0.25:0.75,0.5:0.5:1"),
     [(0, 1, 1, (3, 3, 3, 6), ()), (0.25, 1, 1, (3, 3, 3, 9), ((6, 9),)),
      (0.5, 3, 1, SSSL, ((6, 9), (9, 12))), (0.7, 3, 2, SSSL, ((6, 9), (9, 12)))])], ids=str)
def test_stages_by_hand(changes, stages):
    """Of a member of 2 epochs."""
    config = small_config(num_epochs=2, loop_start=1, loop_end=2, **changes)
    ours = training_stages(config)
    assert [tuple(stage) for stage in ours] == stages
    ends = [*(stage.start for stage in ours[1:]), 1.0]
    for stage, end in zip(ours, ends):
        assert stage_at(ours, stage.start) == stage_at(ours, end - 1e-9) == stage


POINTS = [(0.0, 0.125, 0.25), (0.25, 0.25, 0.5), (0.5, 0.5, 1.0)]


def test_order_of_a_window_schedule_does_not_matter():
    results = []
    for order in ((0, 1, 2), (0, 2, 1), (2, 1, 0)):
        schedule = ",".join("{}:{}:{}".format(*POINTS[i]) for i in order)
        results.append(training_stages(small_config(window_schedule=schedule)))
    assert [stage.windows[-1] for stage in results[0]] == [3, 6, 12]
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("growths", [(), ((768, 1792),), ((768, 1792), (1792, 2048))], ids=str)
def test_yarn_by_hand(growths):
    frequency = 10_000.0 ** (-torch.arange(64, dtype=torch.float64) / 64)
    ours, scale = yarn(frequency, growths)
    expected = frequency.tolist()
    factor = 1.0
    for old, new in growths:
        factor *= 0.2 * math.log(new / old) + 1
        for i, f in enumerate(expected):
            turns = old * f / (2 * math.pi)
            keep = 0.0 if turns < 1 else 1.0 if turns > 32 else (turns - 1) / 31
            expected[i] = f * old / new * (1 - keep) + f * keep
    assert scale == pytest.approx(factor) and relative_error(ours, expected) < 1e-12
    if growths:         # the fastest are kept, the slowest interpolated
        assert ours[0] == frequency[0]
        assert ours[-1] / frequency[-1] == pytest.approx(768 / growths[-1][1])


# ==== Cost and initial weights ==================================================================
@pytest.mark.parametrize("name", [
    "plain", "nothing", "no gates", "five layers, three looped", "all layers looped", "recurrence",
    "LS, tight softcap", "half RoPE, key offset"])
@pytest.mark.parametrize("mtp_weight", [0.0, 0.3])
def test_flops_per_token_against_the_products_that_are_run(name, mtp_weight):
    """PyTorch counts products with weights in a step; 12 D a key of the keys that queries see."""
    changes, known = MODELS[name]
    config = small_config(**{**changes, "mtp_weight": mtp_weight})
    model = random_model(config)
    tokens = random_tokens(config, 2, T)
    specs = model.specs()
    with FlopCounterMode(display=False) as counter:
        hidden = model(tokens, specs)
        loss = (hidden.flatten(0, 1) @ model.head.weight.T).sum()
        if mtp_weight:
            ahead = model.mtp_hidden(hidden, tokens, specs)
            loss = loss + (ahead.flatten(0, 1) @ model.head.weight.T).sum()
        loss.backward()
    weights = counter.get_flop_counts()["Global"][torch.ops.aten.mm] / tokens.numel()

    loops = range(config.loop_start, config.loop_end + 1) if config.loop_count > 1 else ()
    windows = known.get("windows", SSSL)
    windows += tuple(windows[i] for i in loops) * (config.loop_count - 1)
    uses = 4 / 3 if known.get("passes") == 2 else 1         # the first pass has no backward
    keys = [sum(min(i, window) + 1 for i in range(T)) / T for window in (*windows, T)]
    keys = uses * sum(keys[:-1]) + bool(mtp_weight) * keys[-1]
    flops = flops_per_token(config, training_stages(config)[-1])
    assert flops == pytest.approx(weights + 12 * config.model_dim * keys, rel=1e-9)


INITIAL = dict(model_dim=96, num_heads=4, resid_init=1.1, x0_init=0.2, xsa=True, iha=True,
               mtp_weight=0.3)


@pytest.mark.parametrize("proj_init", ["normal", "zero"])
def test_initial_weights(proj_init):
    """Every parameter is filled, to the scale that is its own."""
    model = GPT(small_config(**INITIAL, proj_init=proj_init))
    for p in model.parameters():
        torch.nn.init.constant_(p, torch.nan)
    for name, p in model.init_weights(1).named_parameters():
        constants = {"resid_lambdas": 1.1, "x0_lambdas": 0.2, "skip_lambdas": 1.0}
        is_proj = name.endswith(".proj.weight")
        if name in constants:
            assert torch.equal(p, torch.full_like(p, constants[name]))
        elif name.endswith("attn.mix"):
            assert torch.equal(p, torch.eye(4).expand(3, 4, 4))
        elif re.search(r"attn\.(gate|value_gate|xsa)", name) or is_proj and proj_init == "zero":
            assert not p.any(), name
        else:
            is_normal = is_proj or name in ("wte.weight", "head.weight")
            # of the residual stream, in the MLP's and in mtp_proj, too
            inputs = 96 if is_proj or name == "mtp_proj.weight" else p.shape[1]
            std = {"wte.weight": 1.0, "head.weight": 0.001}.get(name, inputs ** -0.5)
            assert p.std().item() == pytest.approx(std, rel=0.04), name
            assert abs(p.mean().item()) < 0.04 * std, name
            # mean |x| of a normal and of a uniform distribution
            shape = math.sqrt(2 / math.pi) if is_normal else math.sqrt(3) / 2
            assert p.abs().mean().item() / std == pytest.approx(shape, rel=0.03), name


def test_initial_weights_depend_on_the_seed_alone():
    config = small_config(**INITIAL)
    torch.manual_seed(5)
    first, again, other = (GPT(config).init_weights(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name in ("wte.weight", "head.weight", "blocks.0.attn.q.weight", "blocks.3.mlp.fc.weight"):
        pair = np.corrcoef(first[name].flatten(), other[name].flatten())
        assert abs(pair[0, 1]) < 0.05
    layers = np.corrcoef(first["blocks.0.attn.q.weight"].flatten(),
                         first["blocks.1.attn.q.weight"].flatten())
    assert abs(layers[0, 1]) < 0.05
