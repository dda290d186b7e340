"""Looking at attention changes nothing, and what is handed on is what went in."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sim.attention_hook import Shape, max_difference, probe, run


def test_difference_is_that_of_causal_attention():
    rng = np.random.default_rng(1)
    length, scale = 1100, 0.3
    q = rng.standard_normal((4, length, 8)).astype(np.float32)
    k = rng.standard_normal((2, length, 8)).astype(np.float32)
    v = rng.standard_normal((2, length, 5)).astype(np.float32)
    output = np.empty((4, length, 5))
    for head in range(4):
        for row in range(length):
            weights = np.exp(scale * (k[head // 2, : row + 1] @ q[head, row]).astype(float))
            output[head, row] = weights @ v[head // 2, : row + 1] / weights.sum()
    assert max_difference(q, k, v, scale, output) < 1e-5
    assert max_difference(q[:, 1050:], k, v, scale, output[:, 1050:]) < 1e-5  # all 50 rows
    for row in (259, 274, 534, 1099):  # in the runs that are checked
        changed = output.copy()
        changed[3, row, 4] += 0.01
        assert max_difference(q, k, v, scale, changed) == pytest.approx(0.01, abs=1e-5)
    assert max_difference(q, k, v, 2 * scale, output) > 0.1
    output[0, -1, 0] = np.nan
    assert math.isnan(max_difference(q, k, v, scale, output))


def test_recording_changes_nothing_and_keeps_what_came_in(tiny_model, torch):
    model = tiny_model()
    ids = torch.arange(40)[None] % 50
    with torch.no_grad():
        before = model(ids, labels=ids)
        inputs = model(ids, output_hidden_states=True).hidden_states[2]
    taken = {}
    loss = run(model, ids[0].tolist(), [2, 0], lambda *of: taken.setdefault(of[:2], of[2]))
    assert list(taken) == [("prefill", 0), ("prefill", 2)]
    assert loss == pytest.approx(before.loss.item(), abs=1e-6)
    assert math.log(50) - 1 < loss < math.log(50) + 1
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before.logits)
    one = taken["prefill", 2]
    assert (one.q.shape, one.k.shape, one.v.shape) == ((4, 40, 8), (2, 40, 8), (2, 40, 8))
    assert one.softmax_scale == pytest.approx(8**-0.5)
    assert one.max_difference < 1e-5
    # V and, at position 0, where the rotation is none, Q are plain projections of the input.
    block = model.model.layers[2]
    with torch.no_grad():
        normed = block.input_layernorm(inputs)
        v = block.self_attn.v_proj(normed)[0].reshape(40, 2, 8).transpose(0, 1)
        q = block.self_attn.q_proj(normed)[0].reshape(40, 4, 8).transpose(0, 1)
    np.testing.assert_allclose(one.v, v.numpy(), atol=1e-5)
    np.testing.assert_allclose(one.q[:, 0], q[:, 0].numpy(), atol=1e-5)
    assert np.abs(one.q[:, 1] - q[:, 1].numpy()).max() > 1e-4


def test_decoding_sees_what_a_whole_text_would(tiny_model, torch):
    model = tiny_model()
    ids = (torch.arange(30) * 7 % 50).tolist()
    generated: list[int] = []
    taken = {}
    run(
        model,
        ids,
        [0, 1, 2],
        lambda *of: taken.setdefault(of[:2], of[2]),
        phases=("decode",),
        decode_tokens=5,
        generated=generated,
    )
    with torch.no_grad():
        text = torch.tensor([ids])
        expected = model.generate(
            text,
            attention_mask=torch.ones_like(text),
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, 30:].tolist()
    assert generated == expected
    whole = {}
    run(model, ids + generated, [0, 1, 2], lambda *of: whole.setdefault(of[1], of[2]))
    assert list(taken) == [("decode", 0), ("decode", 1), ("decode", 2)]
    for (_, number), one in taken.items():
        assert one.q.shape == (4, 5, 8)
        assert one.max_difference < 1e-5
        np.testing.assert_allclose(one.q, whole[number].q[:, 30:], atol=1e-4)
        np.testing.assert_allclose(one.k, whole[number].k, atol=1e-4)
        np.testing.assert_allclose(one.v, whole[number].v, atol=1e-4)


def test_some_heads_are_those_of_their_kv_heads(tiny_model):
    model = tiny_model()
    ids = list(range(20))
    whole, some = {}, {}
    run(model, ids, [1], lambda *of: whole.setdefault(of[1], of[2]))
    run(model, ids, [1], lambda *of: some.setdefault(of[1], of[2]), kv_heads=[1])
    np.testing.assert_array_equal(some[1].q, whole[1].q[2:])
    np.testing.assert_array_equal(some[1].k, whole[1].k[1:])
    np.testing.assert_array_equal(some[1].v, whole[1].v[1:])


@pytest.mark.parametrize(
    ("phase", "sentence"),
    [
        ("prefill", r"layer 1 does more than softmax.*differs by .*: choose other layers"),
        ("decode", "layer 1 keeps 4 of 41 keys, as with a sliding window"),
    ],
)
def test_a_sliding_window_is_refused(tiny_model, phase, sentence):
    model = tiny_model("Mistral", sliding_window=4)
    # Attention that differs from row to row needs values that do.
    for block in model.model.layers:
        block.self_attn.v_proj.weight.data *= 50
    with pytest.raises(ValueError, match=sentence):
        run(model, list(range(40)), [1], lambda *_: None, phases=(phase,), decode_tokens=2)
    assert model.config._attn_implementation == "sdpa"


def test_probing_tells_shapes_and_what_is_not_there(tiny_model):
    model = tiny_model()
    shape = Shape(heads=4, kv_heads=2, head_dim=8, value_dim=8)
    assert probe(model) == {0: shape, 1: shape, 2: shape}
    assert list(probe(model, [2, 0])) == [0, 2]
    for layers, got in (([3], r"\[3\]"), ([-1, 0], r"\[-1, 0\]"), ([], r"\[\]")):
        with pytest.raises(ValueError, match=f"layers must be between 0 and 2, got {got}"):
            probe(model, layers)


def test_a_model_without_the_interface_is_refused(tiny_model, monkeypatch):
    model = tiny_model()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="'eager' is not in transformers' attention interface"):
        probe(model)
    model = tiny_model()
    block = model.model.layers[1].self_attn
    plain = block.v_proj

    def own(hidden_states, **_):
        return plain(hidden_states).repeat(1, 1, 2), None

    monkeypatch.setattr(block, "forward", own)
    assert list(probe(model, [0, 2])) == [0, 2]
    with pytest.raises(ValueError, match=r"layers \[1\] do not call .*: choose other layers"):
        probe(model)
    with pytest.raises(ValueError, match="this model's attention does not call transformers'"):
        probe(model, [1])
