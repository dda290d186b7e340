"""The model's attention decides as the simulator does, and attends over the same keys."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import sim
from sim.decode import attend_decode, scan_decode
from sim.model_attention import Setting, check_model, skipping
from sim.skip_softmax import attend, scan
from sim.targets import KERNELS, PHASES, Target, target, targets_of

DECODE = [one.name for one in targets_of("decode")]


def test_importing_needs_no_torch():
    program = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "import sim.model_attention"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, "give threshold or threshold_scale_factor, one of them"),
        ({"threshold": 0.1, "threshold_scale_factor": 3}, "one of them"),
        ({"threshold": 1.5}, "threshold must be at most 1"),
        ({"threshold": -0.1}, "threshold must be"),
        ({"threshold_scale_factor": float("nan")}, "threshold_scale_factor must be"),
    ],
)
def test_bad_settings_give_one_sentence(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        Setting.both("ours", **values)


def test_a_setting_names_a_kernel_and_both_phases():
    with pytest.raises(
        ValueError, match="must be one of ours, nvidia, nvidia-256, model-optimizer"
    ):
        Setting.both("theirs", threshold=0.1)
    with pytest.raises(ValueError, match="give a value for prefill and decode"):
        Setting("ours", {"prefill": 0.1})


def test_a_factor_is_divided_by_the_length_and_dense_above_one():
    setting = Setting("ours", None, {"prefill": 100, "decode": 2})
    assert setting.threshold_at("prefill", 400) == 0.25
    assert setting.threshold_at("prefill", 99) == 0.0
    assert setting.threshold_at("decode", 400) == 0.005


@pytest.fixture
def torch():
    pytest.importorskip("transformers", reason="needs the capture extra: torch, transformers")
    return pytest.importorskip("torch", reason="needs the capture extra: torch, transformers")


def arrays(heads: int, kv_heads: int, lq: int, lk: int, seed: int = 0):
    """Q, K, V whose keys, 32 at a time, lie higher or lower for all rows together."""
    rng = np.random.default_rng(seed)
    q, k, v = (
        rng.standard_normal(shape)
        for shape in ((heads, lq, 16), (kv_heads, lk, 16), (kv_heads, lk, 12))
    )
    q[..., 0] = 6
    k[..., 0] += 3 * rng.standard_normal((kv_heads, -(-lk // 32))).repeat(32, axis=1)[:, :lk]
    return tuple(x.astype(np.float32) for x in (q, k, v))


@pytest.mark.parametrize("name", [*KERNELS, "descending"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "lq", "lk"),
    [(2, 1, 1, 1), (3, 1, 65, 65), (4, 2, 300, 300), (6, 2, 129, 400), (1, 1, 700, 700)],
)
def test_prefill_is_the_simulators(torch, name, heads, kv_heads, lq, lk):
    from sim.model_attention import attend_prefill

    if name == "descending":
        one = Target("x", "prefill", (32, 64), name, "head", False, 1, "interleaved", "")
    else:
        one = target(name, "prefill")
    q, k, v = arrays(heads, kv_heads, lq, lk)
    reference = scan(q, k, tile=one.tile, order=one.order, softmax_scale=0.3)
    skips = 0
    for lam in (0.0, 0.001, 0.1, 0.5, 1.0):
        tiles = reference.decide(lam)
        got = attend_prefill(*map(torch.tensor, (q, k, v)), one, lam, 0.3)
        np.testing.assert_array_equal(got.skipped.numpy(), tiles.skipped)
        assert got.visited == tiles.visited.sum()
        expected = attend(q, k, v, tiles, softmax_scale=0.3).output
        np.testing.assert_allclose(got.output.numpy(), expected, atol=1e-5)
        skips += int(tiles.skipped.sum())
    assert skips > 0 or lq < 100


@pytest.mark.parametrize("name", [*DECODE, "ends_first", "contiguous"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "length"), [(2, 1, 1), (3, 1, 64), (4, 2, 65), (6, 2, 777)]
)
def test_decode_is_the_simulators(torch, name, heads, kv_heads, length):
    from sim.model_attention import attend_decode as attend_one

    one = {
        "ends_first": Target("x", "decode", (1, 32), name, "group", True, 3, "interleaved", ""),
        "contiguous": Target("x", "decode", (1, 32), "ascending", "head", False, 4, name, ""),
    }.get(name) or target(name, "decode")
    skips = 0
    for seed in range(3):
        q, k, v = arrays(heads, kv_heads, 1, length, seed)
        steps = q.transpose(1, 0, 2)  # [1 step, Hq, D]
        reference = scan_decode(
            steps,
            k,
            [length],
            keys=one.tile[1],
            order=one.order,
            vote=one.vote,
            splits=one.splits,
            split_layout=one.split_layout,
            seeded=one.seeded,
            softmax_scale=0.3,
        )
        for lam in (0.0, 0.01, 0.3, 1.0):
            tiles = reference.decide(lam)
            got = attend_one(*map(torch.tensor, (q, k, v)), one, lam, 0.3)
            np.testing.assert_array_equal(got.skipped.numpy(), tiles.skipped[0])
            assert got.visited == tiles.visited.sum()
            expected = attend_decode(steps, k, v, tiles, softmax_scale=0.3).output
            np.testing.assert_allclose(got.output.numpy()[:, 0], expected[0], atol=1e-5)
            skips += int(tiles.skipped.sum())
    assert skips > 0 or length < 70


def small_model(torch, kind="Llama", **config):
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "attn_implementation": "sdpa",
    }
    made = getattr(transformers, f"{kind}Config")(**{**sizes, **config})
    model = getattr(transformers, f"{kind}ForCausalLM")(made).eval()
    for name, weights in model.named_parameters():
        if "self_attn" in name:  # attention that differs from row to row
            weights.data *= 12
    return model


def ids(torch, length):
    """Runs of one token, so that neighbouring rows look at the same tiles."""
    runs = np.random.default_rng(1).integers(0, 50, -(-length // 40)).repeat(40)
    return torch.tensor(runs[None, :length])


@pytest.mark.parametrize("name", KERNELS)
def test_factor_zero_gives_the_dense_tokens(torch, name):
    model, prompt = small_model(torch), ids(torch, 333)
    arguments = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    arguments |= {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    dense = model.generate(prompt, **arguments)
    with skipping(model, Setting.both(name, threshold_scale_factor=0)) as tally:
        ours = model.generate(prompt, **arguments)
    assert torch.equal(ours, dense)
    assert len(set(dense[0, 333:].tolist())) > 2
    for phase in PHASES:
        assert tally.skipped[phase].sum() == 0
        one = target(name, phase)
        if phase == "prefill":
            grid = sim.Grid(one.tile, 333, 333, causal=True)
            expected = 4 * grid.visited().sum()
        else:  # the last token is never fed back
            votes = 4 if one.vote == "head" else 2
            expected = votes * sum(-(-(333 + i) // one.tile[1]) for i in range(1, 24))
        assert tally.visited[phase].tolist() == [expected] * 3
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model.generate(prompt, **arguments), dense)


def test_a_large_threshold_skips_and_changes_the_model(torch):
    model, prompt = small_model(torch), ids(torch, 700)
    with torch.no_grad():
        dense = model(prompt, use_cache=False).logits
        moved = []
        for lam in (0.0, 0.01, 0.9):
            with skipping(model, Setting.both("ours", threshold=lam), compare=True) as tally:
                logits = model(prompt, use_cache=False).logits
            moved.append(float((logits - dense).abs().max()))
            error, sparsity = tally.output_error("prefill"), tally.sparsity("prefill")
            assert ((error > 1e-4) == (sparsity > 0)).all()
    assert moved[0] < 1e-4
    assert moved[1] < moved[2]
    assert moved[2] > 0.05
    assert (sparsity > 0.1).all()
    assert tally.skipped["decode"].sum() == 0


def test_the_output_error_is_that_of_the_same_inputs(torch):
    model, prompt = small_model(torch, num_hidden_layers=1), ids(torch, 700)
    kept = {}

    def keep(module, args, output):
        kept.setdefault("runs", []).append(output[0].detach().double().numpy())

    model.model.layers[0].self_attn.o_proj.weight.data = torch.eye(32)
    model.model.layers[0].self_attn.register_forward_hook(keep)
    with torch.no_grad():
        model(prompt, use_cache=False)
        with skipping(model, Setting.both("ours", threshold=0.9), compare=True) as tally:
            model(prompt, use_cache=False)
    dense, ours = kept["runs"]
    expected = np.linalg.norm(ours - dense) / np.linalg.norm(dense)
    assert tally.output_error("prefill")[0] == pytest.approx(expected, rel=1e-4)
    assert expected > 0.01


def test_a_prompt_in_chunks_is_decided_over_the_whole_context(torch):
    model, prompt = small_model(torch), ids(torch, 300)
    setting = Setting.both("nvidia", threshold=0.3)
    with torch.no_grad():
        with skipping(model, setting) as whole:
            expected = model(prompt).logits
        with skipping(model, setting) as parts:
            first = model(prompt[:, :128])
            second = model(prompt[:, 128:], past_key_values=first.past_key_values)
    assert torch.allclose(second.logits, expected[:, 128:], atol=1e-4)
    for phase in PHASES:
        assert parts.skipped[phase].tolist() == whole.skipped[phase].tolist()
        assert parts.visited[phase].tolist() == whole.visited[phase].tolist()
    assert whole.skipped["prefill"].sum() > 0


def test_a_model_it_can_follow_passes_the_check(torch):
    check_model(small_model(torch), ids(torch, 100))


@pytest.mark.parametrize(
    ("kind", "config", "sentence"),
    [
        ("Mistral", {"sliding_window": 9}, "layer 0: its mask is more than causal"),
        ("Qwen2", {}, None),
    ],
)
def test_other_attention_is_refused_or_right(torch, kind, config, sentence):
    model = small_model(torch, kind, **config)
    if sentence is None:
        check_model(model, ids(torch, 60))
    else:
        with pytest.raises(ValueError, match=sentence):
            check_model(model, ids(torch, 60))
    assert model.config._attn_implementation != "skip_softmax_evaluate"


def test_attention_that_does_more_is_refused_by_what_it_does(torch, monkeypatch):
    from transformers import AttentionInterface

    own = AttentionInterface()["sdpa"]

    def with_more(module, *args, **kwargs):
        output, weights = own(module, *args, **kwargs)
        return output * (1.01 if module.layer_idx == 1 else 1), weights

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", with_more)
    with pytest.raises(ValueError, match=r"layer 1 does more than softmax.* differs by 0.009"):
        check_model(small_model(torch), ids(torch, 60))


def test_a_model_without_the_interface_is_refused(torch):
    model = small_model(torch)
    model.config._attn_implementation = "eager_of_its_own"
    with pytest.raises(ValueError, match="'eager_of_its_own' is not in transformers' attention"):
        check_model(model, ids(torch, 9))


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_what_the_kernels_do_not_have_is_refused(torch, name):
    from sim.model_attention import _check_call

    x, module = torch.zeros(1, 2, 5, 8), SimpleNamespace(layer_idx=3, is_causal=True)
    _check_call(module, x, x, None, {name: None, "dropout": 0.0})
    with pytest.raises(ValueError, match=f"layer 3: its attention has {name}"):
        _check_call(module, x, x, None, {name: 50.0})
    with pytest.raises(ValueError, match="layer 3: its attention is not causal"):
        _check_call(SimpleNamespace(layer_idx=3, is_causal=False), x, x, None, {})


def test_a_batch_is_refused(torch):
    model = small_model(torch)
    with (
        skipping(model, Setting.both("ours", threshold=0.1)),
        pytest.raises(ValueError, match="layer 0: one text at a time, got a batch of 2"),
    ):
        model(ids(torch, 20).expand(2, -1))
