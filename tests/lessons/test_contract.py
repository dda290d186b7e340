"""What every lesson promises: gaps that fail, solutions that pass, one text outside the gaps."""

import difflib
import importlib.util
import json
import re
import subprocess
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest
from PIL import Image, ImageColor

from lessons import catalogue, checks
from lessons.helpers import LAYER_12, OUTPUT, ROOT
from sim.decode import scan_decode
from sim.decode_splits import of_splits
from sim.draw import PALETTE
from sim.traces import bundled, read_trace

LESSONS = catalogue.lessons()
each = pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.path.stem)
needs_numba = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="numba has no wheel for this machine"
)
each_that_runs_here = pytest.mark.parametrize(
    "lesson",
    [pytest.param(one, marks=needs_numba) if one.number == 5 else one for one in LESSONS],
    ids=lambda lesson: lesson.path.stem,
)


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_there_are_lessons_and_solutions_one_for_one():
    assert [lesson.number for lesson in LESSONS] == list(range(13))
    assert [lesson.path.name[:2] for lesson in LESSONS] == [f"{one.number:02}" for one in LESSONS]
    solutions = sorted((catalogue.LESSONS / "solutions").glob("*.py"))
    assert solutions == [lesson.solution for lesson in LESSONS]


def test_no_lessons_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "LESSONS", tmp_path)
    with pytest.raises(ValueError, match="there are no lessons in"):
        catalogue.lessons()


def test_a_lesson_without_header_is_an_error(tmp_path):
    path = tmp_path / "06_more.py"
    path.write_text("# %%\nprint(1)\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"06_more\.py must begin with a title"):
        catalogue.read_lesson(path)


@each
def test_unsolved_ends_with_one_message(lesson, program):
    done = program(lesson.path)
    source = text(lesson.path)
    line = next(n for n, one in enumerate(source.splitlines(), 1) if "helpers.todo(" in one)
    task = re.search(r'helpers\.todo\("(.+)"\)', source)[1]
    assert done.stderr == f"\nTo do in lessons/{lesson.path.name}:{line}\n  {task}\n"
    assert done.status == 1
    assert "✅" not in done.stdout
    assert "❌" not in done.stdout


@each
def test_every_gap_counts(lesson, program, gap, tmp_path):
    """With all gaps filled but one, that one is reported."""
    skeleton, solution = text(lesson.path), text(lesson.solution)
    left = [found.span(2) for found in gap.finditer(solution)]
    tasks = [found[2] for found in gap.finditer(skeleton)]
    assert len(left) == len(tasks) > 0
    for i, ((start, stop), task) in enumerate(zip(left, tasks, strict=True)):
        path = tmp_path / f"{lesson.path.stem}_{i}.py"
        path.write_text(solution[:start] + task + solution[stop:], encoding="utf-8")
        done = program(path)
        assert done.status == 1
        assert done.stderr.startswith("\nTo do in ")
        assert done.stderr.count("\n") == 3


@each_that_runs_here
def test_solution_passes_in_time(lesson, program, slack):
    done = program(lesson.solution)
    assert (done.status, done.stderr) == (0, "")
    assert done.seconds <= 15 * slack
    assert re.search(r"^✅ (\d+)/\1 cases", done.stdout, re.M)
    assert done.stdout.count("❌") == 1, "“Break it” shows the damage, once"
    assert done.stdout.index("✅") < done.stdout.index("❌")
    assert done.stdout.count("Predict first (") == 1
    assert (OUTPUT / f"{lesson.path.stem}.png").read_bytes().startswith(b"\x89PNG")


@each
def test_same_text_outside_the_gaps(lesson, gap):
    left, right = (
        gap.sub("# gap\n", text(path)).splitlines() for path in (lesson.path, lesson.solution)
    )
    drift = list(difflib.unified_diff(left, right, "lesson", "solution", lineterm=""))
    assert not drift, "\n".join(drift)
    assert "helpers.todo(" not in text(lesson.solution)


@each
def test_size(lesson, gap):
    assert len(text(lesson.path).splitlines()) <= 250
    assert len(text(lesson.solution).splitlines()) <= 250
    for announced, filling in gap.findall(text(lesson.solution)):
        assert abs(len(filling.splitlines()) - int(announced)) <= 1
    for _, filling in gap.findall(text(lesson.path)):
        assert len(filling.splitlines()) == 1


@each
def test_order_of_parts(lesson):
    parts = [
        "**Question:**",
        "## Predict",
        "PREDICT:",
        "FILL ME IN",
        "checks.check_",
        "## The pict",
    ]
    parts += ["helpers.show(", "helpers.app_link(", "## Break it", "strict=False"]
    places = [text(lesson.path).index(part) for part in parts]
    assert places == sorted(places)


WRONG = [
    ("00_attention", "scores = q @ k.T * scale", "scores = q @ k.T", "in order: scores times"),
    ("00_attention", "axis=1, keepdims=True)\n    # END", "axis=0)\n    # END", "each row|row ÷"),
    ("01_softmax_needs_a_max", "scores - m)", "scores - scores.max())", "its own maximum"),
    ("01_softmax_needs_a_max", "np.where(m == -np.inf, 0, m)", "m", "use 0 as its maximum"),
    ("02_online_softmax", "acc = acc * alpha + p @ v", "acc = acc + p @ v", "1 / alpha"),
    ("02_online_softmax", "alpha = np.exp(m - m_new)", "alpha = np.exp(m_new - m)", "alpha|plain"),
    ("03_tiles", "columns <= group[:, None]", "columns < group[:, None]", "mask the others"),
    ("03_tiles", "visited = -(-(group[-1] + 1) // keys)", "visited = 1", "last row of a group"),
    ("03_tiles", "visited = -(-(group[-1] + 1) // keys)", "visited = n // keys", "last row"),
    ("04_skip_test", "row_gap.max()", "row_gap.mean()", "largest"),
    ("04_skip_test", "gap[i, j] < ln_lam\n            # END", "True\n            # END", "λ = 0"),
    ("04_skip_test", "np.where(tile_max == -np.inf, -np.inf, tile_max - m)", "tile_max - m", "nan"),
    ("05_blocks_and_threads", "cuda.blockIdx.x * cuda.blockDim.x + ", "", "the blocks before"),
    ("05_blocks_and_threads", "if row >= q.shape[0]", "if row > q.shape[0]", "more threads"),
    ("05_blocks_and_threads", "l = l * alpha + p", "l = l + p", "l is rescaled"),
    ("06_tensor_core_fragments", "register % 2 * 8", "register // 2 * 8", "8 rows below"),
    ("06_tensor_core_fragments", "column = lane // 4\n", "column = lane % 8\n", "quad is"),
    ("06_tensor_core_fragments", "= a[row, column // 2]", "= a[row, column % 8]", "of b_columns"),
    ("07_vote_races_divergence", "cuda.syncthreads()\n        # END", "# END", "have written"),
    ("07_vote_races_divergence", "mine = t >= rows or ", "mine = ", "do not exist vote"),
    ("07_vote_races_divergence", "= bar_red_and(1, THREADS, mine)", "= mine", "all must vote"),
    ("07_vote_races_divergence", "range(5):\n        top", "range(4):\n        top", "and 16"),
    ("08_sparsity_against_error", "visited & (gap", "(gap", "not visited has gap"),
    ("08_sparsity_against_error", "/ visited.sum()", "/ visited.size", "skipped ÷ visited"),
    ("08_sparsity_against_error", "gap < ln_lam)", "gap < np.exp(ln_lam))", "below ln λ"),
    (
        "08_sparsity_against_error",
        "repeat(vote_rows, axis=0)[: len(mass)]",
        "repeat(vote_rows, axis=0)",
        "repeat|and crop",
    ),
    (
        "08_sparsity_against_error",
        "np.where(left_out, mass",
        "np.where(left_out, 0 * mass",
        "alike",
    ),
    ("08_sparsity_against_error", "- lost) / (1 - delta)[:, None]", "- lost)", "the other parts"),
    (
        "09_calibrating_a_real_model",
        "lengths[:, None] * lams",
        "lams + 0 * lengths[:, None]",
        "times",
    ),
    ("09_calibrating_a_real_model", ">= 0.1) & (sparsity <= 0.9)", ">= 0)", "the line bends"),
    (
        "09_calibrating_a_real_model",
        "np.polyfit(sparsity, np.log(factor), 1)",
        "np.polyfit(sparsity, factor, 1)",
        "slope",
    ),
    (
        "09_calibrating_a_real_model",
        "b, ln_a = np.polyfit(sparsity, np.log(factor), 1)",
        "t, r = np.polyfit(np.log(factor), sparsity, 1)\n    b, ln_a = 1 / t, -r / t",
        "least squares",
    ),
    ("10_the_certified_bound", "seen * np.exp", "np.exp", "n keys that the row sees"),
    ("10_the_certified_bound", "u *= alpha", "u *= 1", "multiplied by alpha"),
    ("10_the_certified_bound", "(mine > -np.inf).sum(axis=1)", "mine.shape[1]", "row sees"),
    ("10_the_certified_bound", "mine = s[:, owner == t]", "mine = s[:, owner == 0]", "own columns"),
    (
        "10_the_certified_bound",
        "u.sum(axis=0) / (l + u.sum(axis=0))",
        "u.sum(axis=0) / l",
        "l \\+ u",
    ),
    (
        "11_why_decode_is_different",
        "np.maximum(tile_max[0], tile_max[-1])",
        "tile_max[0]",
        "larger row maximum",
    ),
    ("11_why_decode_is_different", "- m).max() < ln_lam", "- m).min() < ln_lam", "all must agree"),
    ("11_why_decode_is_different", "l * np.exp(m - top) for", "l for", "the largest m"),
    ("11_why_decode_is_different", "sizes[~skipped]", "sizes[skipped]", "V of those not skipped"),
    ("11_why_decode_is_different", "sizes.sum() + 2", "sizes[~skipped].sum() + 2", "K of all"),
    (
        "11_why_decode_is_different",
        "sizes[~skipped].sum()",
        "keys * (~skipped).sum()",
        "may be short",
    ),
    ("12_the_asynchronous_pipeline", "stage, parity ^ 1)", "stage, parity)", "`parity \\^ 1`"),
    ("12_the_asynchronous_pipeline", "stage, BYTES)", "stage, BYTES // 2)", "with BYTES"),
    ("12_the_asynchronous_pipeline", "wgmma_wait(0, s, KEYS)\n", "\n", "behind wgmma_wait"),
    ("12_the_asynchronous_pipeline", "mbarrier_wait(full, parity)\n", "\n", "too early"),
    (
        "12_the_asynchronous_pipeline",
        "    if cuda.threadIdx.x % 128 == 0:\n        mbarrier_wait(full, parity)\n",
        "    mbarrier_wait(full, parity)\n    if cuda.threadIdx.x % 128 == 0:\n",
        "one thread waits",
    ),
    (
        "12_the_asynchronous_pipeline",
        "mbarrier_arrive(empty)\n    # END",
        "pass\n    # END",
        "never",
    ),
]


@pytest.mark.parametrize(("name", "right", "wrong", "hint"), WRONG)
def test_wrong_filling_is_found(name, right, wrong, hint, program, tmp_path):
    source = text(catalogue.LESSONS / "solutions" / f"{name}.py")
    assert right in source
    path = tmp_path / f"{name}.py"
    path.write_text(source.replace(right, wrong, 1), encoding="utf-8")
    done = program(path)
    assert done.status == 1
    assert "✅" not in done.stdout
    message = done.stderr.strip().splitlines()
    assert message[0].startswith("❌ ")
    assert "Traceback" not in done.stderr
    assert re.search(rf"hint: .*({hint})", message[-1]), message[-1]


@each_that_runs_here
def test_link_opens_the_app_with_these_settings(lesson, program, root):
    from streamlit.testing.v1 import AppTest

    link = re.search(r"http://\S+", program(lesson.solution).stdout)[0]
    parts = urlsplit(link)
    parameters = parse_qsl(parts.query, strict_parsing=True)
    app = AppTest.from_file(root / "app" / "streamlit_app.py", default_timeout=60)
    page = parts.path.strip("/")
    if page:
        app.run()
    for name, value in parameters:
        app.query_params[name] = value
    if page:
        app.switch_page(f"app_pages/{page}.py")
    app.run()
    assert not app.exception
    assert {name for name, _ in parameters} >= {"source", "kv_head" if page else "head"}
    for name, value in parameters:
        got = app.session_state[name]
        assert got == (value if isinstance(got, str) else json.loads(value)), name


@pytest.mark.parametrize(("number", "first"), [(1, "computed"), (11, "masked")])
def test_pictures_of_cells_have_a_legend(number, first, program):
    lesson = LESSONS[number]
    assert program(lesson.solution).status == 0
    picture = Image.open(OUTPUT / f"{lesson.path.stem}.png")
    below_the_title = picture.getpixel((12, 38))
    assert below_the_title == ImageColor.getrgb(PALETTE[first])
    assert picture.getpixel((2, 38)) == (255, 255, 255)  # not yet the map


def test_the_table_of_decode_is_the_apps(program):
    """The app: means over tokens by `of_splits`, and a headline of the newest token alone."""
    printed = program(LESSONS[11].solution).stdout
    trace = read_trace(bundled()[LAYER_12])
    for splits in (1, 4, 16, 64):
        [mean] = of_splits([trace], lengths=[4096], splits=[splits], thresholds=[0.01])
        assert f"{splits:3} splits {mean.plain:14.1%} {mean.seeded:8.1%} " in printed
    how = {"softmax_scale": trace.softmax_scale, "splits": 16}
    plain, seeded = (
        scan_decode(trace.q[None, :, -1], trace.k, [4096], seeded=seeded, **how).decide(0.01)
        for seeded in (False, True)
    )
    shares = f"{plain.sparsity[0]:.1%} plain, {seeded.sparsity[0]:.1%} seeded"
    assert f"the newest token alone, by 16 splits: {shares}\n" in printed


def test_mentioned_files_exist():
    sources = [*(one.path for one in LESSONS), *catalogue.NOTEBOOKS]
    written_by_lessons = {"lessons/output", "lessons/output/by_numba.py"}
    mentioned = {
        name
        for path in sources
        for name in re.findall(r"`((?:app|cuda_kernels|lessons|sim)/[\w/.]+)`", text(path))
    } - written_by_lessons
    assert mentioned
    assert [name for name in mentioned if not (ROOT / name).exists()] == []


def test_readme_is_generated():
    assert text(catalogue.LESSONS / "README.md") == catalogue.readme()
    links = re.findall(r"\]\(([^)]+)\)", catalogue.readme())
    assert len(links) == 2 * len(LESSONS) + len(catalogue.NOTEBOOKS)
    assert [link for link in links if not (catalogue.LESSONS / link).is_file()] == []


def test_every_check_belongs_to_a_lesson():
    names = [name for name in vars(checks) if name.startswith("check_")]
    assert len(names) == len(LESSONS)
    for lesson, name in zip(LESSONS, names, strict=True):
        assert f"checks.{name}(" in text(lesson.path)


def test_no_notebook_or_picture_is_committed():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git clone")
    command = ["git", "-C", str(ROOT), "ls-files", "lessons"]
    tracked = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert [name for name in tracked if not name.endswith((".py", ".md"))] == []
