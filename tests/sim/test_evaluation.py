"""Evaluating: losses, divergences and needles are what their definitions say, end to end."""

from __future__ import annotations

import json
import math
import pickle
import re
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from sim.evaluation import _CITIES, Evaluator
from sim.evaluation_report import answers, bundled_evaluation, interval, report_of, sparsity_at
from sim.model_attention import Setting
from sim.quality_plot import quality_plot
from sim.texts import HELD_OUT, Text

CARD = {"model": "a <model>", "texts": []}


def test_importing_needs_no_torch():
    program = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "import sim.evaluation"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# The report, from made-up results.


def text_result(sparsity: float, change: float, threshold: float, dense: float = 2.0):
    one = {
        "threshold": threshold,
        "loss_dense": dense,
        "loss": dense + change,
        "kl_mean": change / 2,
        "kl_worst": 10 * change,
        "same_token": 0.9,
        "sparsity": [sparsity - 0.1, sparsity + 0.1],
        "output_error": [0.1, 0.3],
    }
    return {"prefill": one, "decode": dict(one)}


def text_job(text: int, length: int, kernel: str, threshold: float):
    return {
        "kind": "text",
        "text": text,
        "length": length,
        "depth": None,
        "kernel": kernel,
        "threshold": {"prefill": threshold, "decode": threshold},
        "threshold_scale_factor": None,
    }


def law(length: int, kernel: str, threshold: float, text: int) -> tuple[float, float]:
    """Sparsity a logarithm of λ · L, and a loss that grows as its square."""
    sparsity = 0.1 * math.log(threshold * length) + (0.05 if kernel == "ours" else 0.0)
    return sparsity, (0.04 + 0.002 * text) * sparsity**2


LAMBDAS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.3, 0.9)


def made_up(lengths=(1000, 2000, 4000), kernels=("ours", "nvidia")):
    return [
        (text_job(text, length, kernel, lam), text_result(*law(length, kernel, lam, text), lam))
        for length in lengths
        for kernel in kernels
        for lam in LAMBDAS
        for text in range(4)
    ]


def test_rows_are_means_over_texts():
    report = report_of(made_up(), CARD)
    assert len(report["rows"]) == 3 * 2 * len(LAMBDAS)
    row = report["rows"][3]
    assert (row["kernel"], row["length"], row["texts"]) == ("ours", 1000, 4)
    s = 0.1 * math.log(10) + 0.05
    change = np.array([(0.04 + 0.002 * text) * s**2 for text in range(4)])
    prefill = row["prefill"]
    assert prefill["sparsity"] == pytest.approx([s] * 3, rel=1e-4)
    value, low, high = prefill["perplexity_change"]
    assert value == pytest.approx(np.expm1(change.mean()), rel=1e-4)
    assert np.expm1(change.min()) <= low < value < high <= np.expm1(change.max())
    assert prefill["perplexity"] == pytest.approx(np.exp(2 + change.mean()), rel=1e-4)
    assert prefill["kl_worst"] == pytest.approx(10 * change.max(), rel=1e-4)
    assert prefill["sparsity_of_layers"] == pytest.approx([s - 0.1, s + 0.1], rel=1e-2)
    assert prefill["output_error"] == pytest.approx(0.2)
    json.dumps(report, allow_nan=False)


def test_the_answers_recover_a_law():
    found = answers(made_up())
    by_key = {(one["kernel"], one["length"]): one["changes"] for one in found["skippable"]}
    for (kernel, length), changes in by_key.items():
        for one in changes:
            exact = math.sqrt(math.log1p(one["perplexity_change"]) / 0.043)
            lowest = law(length, kernel, 0.001, 0)[0]
            if exact > lowest:  # below, the curve is a straight line to nothing skipped
                assert one["sparsity"][0] == pytest.approx(exact, abs=0.02)
            assert one["sparsity"][1] <= one["sparsity"][0] <= one["sparsity"][2]
            assert one["reached"]
    for kernel in ("ours", "nvidia"):
        at = next(x for x in found["thresholds"] if x["kernel"] == kernel)["at"]
        of_sparsity = [x for x in at if "sparsity" in x and x["exponent"] is not None]
        assert of_sparsity
        for one in of_sparsity:
            assert one["exponent"] == pytest.approx([-1, -1, -1], abs=0.02)
    for one in found["gains"]:
        assert one["kernel"] == "nvidia"
        assert abs(one["changes"][1]["more_sparsity"][0]) < 0.02  # the same loss at a sparsity


def test_an_unfinished_sweep_answers_from_what_is_whole():
    whole = made_up()
    found = answers(whole)
    extra = [
        (text_job(0, length, "ours", 0.7), text_result(0.9, 9.0, 0.7)) for length in (1000, 8000)
    ]
    assert answers(extra + whole[::-1]) == found
    part = [(job, of) for job, of in whole if job["length"] < 4000 or job["text"] < 2]
    part = [one for one in part if one[0]["text"] < 1 or one[0]["kernel"] == "ours"]
    kept = [(job, of) for job, of in whole if job["text"] == 0]
    assert answers(part)["gains"] == answers(kept)["gains"]


def test_a_better_order_shows_as_a_gain():
    results = made_up(lengths=(4000,))
    better = []
    for job, result in results:
        if job["kernel"] == "ours":
            result["prefill"]["sparsity"] = [x + 0.07 for x in result["prefill"]["sparsity"]]
        better.append((job, result))
    (one,) = answers(better)["gains"]
    assert one["changes"][1]["more_sparsity"][0] == pytest.approx(0.07, abs=0.01)
    assert one["changes"][1]["more_sparsity"][1] > 0.05


@pytest.mark.parametrize(
    ("change", "most", "expected"),
    [
        ([0.0, 0.01, 0.02], 0.005, (0.15, True)),
        ([0.0, 0.01, 0.02], 0.015, (0.25, True)),
        ([0.01, 0.02, 0.03], 0.005, (0.05, True)),  # from nothing skipped, nothing changed
        ([0.0, 0.01, 0.005], 0.02, (0.3, False)),
        ([-0.01, 0.0, 0.01], 0.005, (0.25, True)),
        ([0.0, 0.01, 0.0], 0.01, (0.2, True)),
    ],
)
def test_the_sparsity_at_a_change(change, most, expected):
    got = sparsity_at(np.array([0.1, 0.2, 0.3]), np.array(change), most)
    assert got == (pytest.approx(expected[0]), expected[1])


def test_intervals_are_the_same_every_time_and_cover():
    values = np.random.default_rng(1).normal(3, 1, 200)
    one = interval(lambda drawn: values[drawn].mean(), 200)
    assert one == interval(lambda drawn: values[drawn].mean(), 200)
    half = 1.96 * values.std() / math.sqrt(200)
    assert one == pytest.approx([values.mean(), values.mean() - half, values.mean() + half], 0.02)
    assert interval(lambda drawn: None, 5) is None


def test_the_needle_is_counted_over_texts_and_depths():
    results = []
    for text in range(2):
        for depth in (0.1, 0.9):
            job = text_job(text, 1000, "ours", 0.1) | {"kind": "needle", "depth": depth}
            found = text == 0 or depth == 0.9
            results.append(
                (
                    job,
                    {
                        "probability_dense": 0.8,
                        "probability": 0.4 + depth / 10,
                        "found_dense": True,
                        "found": found,
                        "sparsity": 0.25,
                    },
                )
            )
    (row,) = report_of(results, CARD)["needle"]
    assert row["found"] == [0.75, 0.5, 1.0]
    assert row["found_dense"] == [1, 1, 1]
    assert row["probability"] == pytest.approx([0.45] * 3)
    assert [one["found"] for one in row["depths"]] == [0.5, 1.0]
    assert [one["probability"] for one in row["depths"]] == pytest.approx([0.41, 0.49])
    (unfinished,) = report_of(results[:3], CARD)["needle"]
    assert (unfinished["texts"], unfinished["found"]) == (1, [1, 1, 1])
    assert report_of([results[0], results[3]], CARD)["needle"] == []


def test_the_plot_is_svg_and_shows_every_row():
    report = report_of(made_up(), CARD)
    root = ElementTree.fromstring(quality_plot(report).svg())
    space = "{http://www.w3.org/2000/svg}"
    assert root.find(f"{space}title").text.endswith("a <model>")
    assert len(root.findall(f"{space}circle")) == len(report["rows"])
    assert len(root.findall(f"{space}polyline")) == 6
    for circle in root.findall(f"{space}circle"):
        assert 70 <= float(circle.get("cx")) <= 570
        assert 46 <= float(circle.get("cy")) <= 404
    first, last = (
        root.findall(f"{space}polyline")[0].get("points").split()[i].split(",") for i in (0, -1)
    )
    assert float(first[0]) < float(last[0])
    assert float(first[1]) > float(last[1])  # more skipped, larger change, higher up


def test_the_recorded_evaluation_is_whole_and_names_no_machine():
    report = bundled_evaluation()
    text = json.dumps(report)
    assert not re.search(r"/(tmp|home|root|work|Users)/|://|[A-Z]:\\\\", text)
    assert report["command"].startswith("skip-softmax evaluate SmolLM2-135M-Instruct.Q4_1.gguf ")
    assert report["date"] >= "2026-11-23"
    assert {"python", "torch", "transformers", "numpy"} <= set(report["versions"])
    topics = {re.search(r"topic '(.*)'", text["title"])[1] for text in report["texts"]}
    assert topics == set(HELD_OUT)
    assert {text["license"] for text in report["texts"]} == {"PSF-2.0"}
    kernels = {(row["kernel"], row["length"]) for row in report["rows"]}
    assert kernels == {(k, n) for k in ("ours", "nvidia") for n in (1024, 2048, 4096)}
    for key in kernels:
        rows = [row for row in report["rows"] if (row["kernel"], row["length"]) == key]
        sparsity = [row["prefill"]["sparsity"][0] for row in rows]
        divergence = [row["prefill"]["kl_mean"][0] for row in rows]
        assert sparsity == sorted(sparsity)
        assert divergence == sorted(divergence)
        assert all(len(row["prefill"]["sparsity_of_layers"]) == 30 for row in rows)
    ElementTree.fromstring(quality_plot(report).svg())


# Measuring, on a tiny random model that is saved as a folder with its tokenizer.

WORDS = [a + b for a in "bcdfg" for b in "aeiouxyz"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder: random, attention that looks at runs of words, a word-level tokenizer."""
    torch = pytest.importorskip("torch", reason="needs the capture extra: torch, transformers")
    transformers = pytest.importorskip("transformers", reason="needs the capture extra")
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("model")
    others = ["The", "secret", "number", "of", "is", ".", *"0123456789", *_CITIES]
    known = ["[UNK]", "\n", *WORDS, *others]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Split(".", "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(
        path
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(known),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        attn_implementation="sdpa",
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for name, weights in model.named_parameters():
        weights.data *= 12 if "self_attn" in name else 4 if "lm_head" in name else 1
    model.save_pretrained(path)
    return path


def made_up_text(seed: int) -> Text:
    rng = np.random.default_rng(seed)
    runs = [[WORDS[rng.integers(40)]] * 30 for _ in range(40)]
    return Text("\n".join(" ".join(run) for run in runs), f"text {seed}", "CC0-1.0")


TEXTS = (made_up_text(0), made_up_text(1))


@pytest.fixture
def evaluator(folder):
    from sim.evaluation import _dense, _model

    yield Evaluator(str(folder), TEXTS, decode_tokens=5)
    _model.cache_clear()
    _dense.cache_clear()


def dense_logits(folder, ids):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([list(ids)])).logits[0], -1).double().numpy()


def ids_of(folder, text, count):
    from sim.model import load, tokenize

    return tokenize(load(folder).tokenizer, text, count).ids


def test_losses_are_those_of_a_plain_forward(folder, evaluator):
    result = evaluator.text(1, 300, Setting.both("ours", threshold=0.0))
    ids = ids_of(folder, TEXTS[1], 306)
    logp = dense_logits(folder, ids)
    losses = -logp[np.arange(305), ids[1:]]
    for phase, expected in (("prefill", losses[:300].mean()), ("decode", losses[300:].mean())):
        one = result[phase]
        assert one["loss_dense"] == pytest.approx(expected, rel=1e-4)
        assert one["loss"] == pytest.approx(one["loss_dense"], abs=1e-5)
        assert one["kl_worst"] < 1e-6
        assert one["same_token"] == 1
        assert one["sparsity"] == [0, 0]
        assert max(one["output_error"]) < 1e-5
    assert losses.std() > 0.1


def test_divergences_are_over_the_whole_vocabulary(folder, evaluator):
    import torch
    from transformers import AutoModelForCausalLM

    from sim.model_attention import skipping

    setting = Setting.both("nvidia", threshold=0.9)
    result = evaluator.text(0, 400, setting)["prefill"]
    ids = ids_of(folder, TEXTS[0], 401)
    p = dense_logits(folder, ids[:400])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with skipping(model, setting) as tally, torch.no_grad():
        logits = model(torch.tensor([ids[:400]])).logits[0].double()
    q = torch.log_softmax(logits, -1).numpy()
    kl = (np.exp(p) * (p - q)).sum(1)
    assert result["kl_mean"] == pytest.approx(kl.mean(), rel=1e-3)
    assert result["kl_worst"] == pytest.approx(kl.max(), rel=1e-3)
    assert result["same_token"] == pytest.approx((p.argmax(1) == q.argmax(1)).mean())
    assert result["loss"] == pytest.approx(-q[np.arange(400), ids[1:]].mean(), rel=1e-4)
    assert result["sparsity"] == pytest.approx(tally.sparsity("prefill"), rel=1e-4)
    assert kl.mean() > 1e-5
    assert sum(result["sparsity"]) > 0.05


def test_decode_uses_its_own_threshold(evaluator):
    only_decode = Setting("ours", {"prefill": 0.0, "decode": 0.9})
    only_prefill = Setting("ours", {"prefill": 0.9, "decode": 0.0})
    one, other = (evaluator.text(0, 400, setting) for setting in (only_decode, only_prefill))
    assert sum(one["prefill"]["sparsity"]) == sum(other["decode"]["sparsity"]) == 0
    assert sum(one["decode"]["sparsity"]) > 0
    assert sum(other["prefill"]["sparsity"]) > 0
    assert one["prefill"]["kl_worst"] < 1e-6 < one["decode"]["kl_worst"]


def test_other_processes_get_the_same_work(evaluator):
    sent = pickle.loads(pickle.dumps(evaluator))
    assert sent == evaluator
    job = text_job(0, 100, "ours", 0.3)
    assert sent(job) == evaluator(job)


@pytest.mark.parametrize("depth", [0, 0.5, 1])
def test_the_needle_is_in_the_text_once(folder, depth):
    from sim.evaluation import hide_needle
    from sim.model import load

    tokenizer = load(folder).tokenizer
    prompt, answer = hide_needle(tokenizer, TEXTS[0], 300, depth, 7)
    assert len(prompt) == 300
    words = [tokenizer.convert_ids_to_tokens(i) for i in prompt]
    marks = [i for i, word in enumerate(words) if word == "secret"]
    assert len(marks) == 2
    assert words[-6:-1] == ["The", "secret", "number", "of", words[marks[0] + 3]]
    assert words[-1] == "is"
    hidden = prompt[marks[0] + 5 : marks[0] + 5 + len(answer)]
    assert hidden == answer
    assert abs(marks[0] / 300 - depth) < 0.2
    assert words[marks[0] - 2] == "\n"
    assert words[marks[0] - 3] == "\n" or depth == 0  # at the end of a line
    again = hide_needle(tokenizer, TEXTS[0], 300, depth, 7)
    assert again == (prompt, answer)


def test_the_needle_is_scored_token_by_token(folder, evaluator):
    from sim.evaluation import hide_needle
    from sim.model import load

    result = evaluator.needle(0, 300, 0.5, Setting.both("ours", threshold=0.0))
    prompt, answer = hide_needle(load(folder).tokenizer, TEXTS[0], 300, 0.5, 0)
    logp = dense_logits(folder, prompt + answer)
    rows = np.arange(299, 299 + len(answer))
    expected = np.exp(logp[rows, answer].sum())
    assert result["probability_dense"] == pytest.approx(expected, rel=1e-3)
    assert result["probability"] == pytest.approx(expected, rel=1e-3)
    assert result["found"] == result["found_dense"] == bool((logp[rows].argmax(1) == answer).all())


def test_a_model_is_evaluated_end_to_end(folder, tmp_path):
    from sim.evaluation import evaluate

    settings = [
        Setting.both(kernel, threshold=lam) for kernel in ("ours", "nvidia") for lam in (0.1, 0.9)
    ]
    arguments = {"lengths": (200, 400), "needle_lengths": (200,), "depths": (0.5,)}
    arguments |= {"texts": TEXTS, "decode_tokens": 3, "workers": 1}
    report = evaluate(folder, tmp_path / "out", settings, **arguments)
    assert len(report["rows"]) == 8
    assert len(report["needle"]) == 4
    assert report["model"] == folder.name
    assert str(folder) not in json.dumps(report)
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert written == report
    ElementTree.parse(tmp_path / "out" / "quality.svg")
    lines = (tmp_path / "out" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + 16 + 8
    again = evaluate(folder, tmp_path / "out", settings, **arguments)
    assert again == report
    assert (tmp_path / "out" / "results.jsonl").read_text(encoding="utf-8").splitlines() == lines
    more = evaluate(folder, tmp_path / "out", settings, **{**arguments, "lengths": (100,)})
    assert more["rows"][0]["length"] == 100
    assert [row for row in more["rows"] if row["length"] > 100] == report["rows"]
    with pytest.raises(ValueError, match="another sweep: decode_tokens differ"):
        evaluate(folder, tmp_path / "out", settings, **{**arguments, "decode_tokens": 4})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"lengths": (2000,)}, r"lengths must be between 2 and 1018, .* got 2000"),
        ({"lengths": (1,)}, r"lengths must be between 2 and"),
        ({"texts": (Text("ba be bi", "short", ""),)}, "the text 'short' has only 3 .* not 306"),
        ({"depths": (1.5,)}, "depths must lie between 0 and 1, got 1.5"),
        ({"needle_lengths": (9,)}, "lengths must leave room for the needle, got 9"),
        ({"decode_tokens": -1}, "decode_tokens must be between 0 and 1024, got -1"),
        ({"settings": []}, "settings must be at least one, and differ"),
        ({"lengths": ()}, "give at least one text and one length"),
        ({"model": "no/such/model"}, "model must be a folder, a .gguf file or a name"),
    ],
)
def test_bad_arguments_give_one_sentence_before_work(folder, tmp_path, change, sentence):
    from sim.evaluation import evaluate

    arguments = {
        "model": folder,
        "settings": [Setting.both("ours", threshold=0.1)],
        "lengths": (300,),
        "texts": TEXTS,
        "decode_tokens": 5,
        **change,
    }
    with pytest.raises(ValueError, match=sentence):
        evaluate(arguments.pop("model"), tmp_path / "out", arguments.pop("settings"), **arguments)
    assert not (tmp_path / "out").exists()
