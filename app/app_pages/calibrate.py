"""Calibrate: from gap maps of texts to the scale factor that skips the share of tiles wanted."""

import streamlit as st

from app import calibration_words as words
from app import calibrations, gap_map_sources
from app.sections import section
from app.wording import code, percent
from sim.calibration import SPACES
from sim.calibration_file import to_json
from sim.engines import ENGINES, decision, export, head_dim_of, hopper_line
from sim.evaluation_report import bundled_evaluation
from sim.targets import PHASES, target


def choose(label: str, options: list[str], key: str, help: str | None = None) -> str:
    """Offer a choice that is bound to the URL; one that is not on offer any more is forgotten."""
    if st.session_state.get(key, options[0]) not in options:
        del st.session_state[key]
    return st.segmented_control(
        label,
        options,
        default=options[0],
        required=True,
        key=key,
        bind="query-params",
        help=help,
    )


def take_upload() -> None:
    """Make the uploaded files the source."""
    if files := st.session_state["maps_files"]:
        gap_map_sources.keep_upload([file.getvalue() for file in files])
        st.session_state["maps"] = gap_map_sources.UPLOAD


# ---- What is calibrated on, and for -------------------------------------------------------------
with st.sidebar:
    name = st.selectbox("Gap maps", gap_map_sources.names(), key="maps", bind="query-params")
    settings_slot = st.container()
    st.file_uploader(
        "Open gap maps or traces",
        type="safetensors",
        accept_multiple_files=True,
        key="maps_files",
        on_change=take_upload,
        help="Of your own model: files that `skip-softmax capture` wrote, all of one capture. "
        "Or traces of one model, which are scanned for every kernel.",
    )

st.title("Calibrate", anchor=False)
bar = st.empty()


def scanned(share: float) -> None:
    """Show how much of the traces has been scanned."""
    bar.progress(share, "Forming Q·Kᵀ of the traces")


try:
    source = gap_map_sources.load(name, scanned)
except (ValueError, OSError) as error:
    st.error(f"{code(name)} was not opened: {code(str(error))}")
    source = gap_map_sources.load(gap_map_sources.BUNDLED, scanned)
bar.empty()
maps = source.maps
phases = [one for one in PHASES if any(sample.phase == one for sample in maps.samples)]

with settings_slot:
    phase = choose("Phase", phases, "phase")
    kernel = choose(
        "Kernel",
        list(maps.kernels),
        "for_kernel",
        help="Whose decision grid, visit order and vote: the kernels here; NVIDIA’s on Hopper, "
        "which engines run, at larger head_dim (nvidia) or at 32 to 64 and in FP8 (nvidia-256); "
        "or Model Optimizer’s own calibration.",
    )
    made = target(kernel, phase)
    st.caption(f"{made.description} It decides on {decision(made)}.")
    space = choose(
        "Space of the fit",
        list(SPACES),
        "space",
        help="Least squares on the factor’s logarithm, or, as Model Optimizer does, on the factor.",
    )

lengths = sorted({sample.length for sample in maps.samples})
texts = {sample.text for sample in maps.samples}
st.markdown(
    "Which `threshold_scale_factor` skips the share of tiles that you want? Choose the share; "
    "the factor comes from the gaps of "
    f"{len(texts)} {'text' if len(texts) == 1 else 'texts'} at "
    f"{', '.join(f'{n:,}' for n in lengths)} tokens, {len(maps.layers)} "
    f"{'layer' if len(maps.layers) == 1 else 'layers'} and {len(maps.heads)} heads."
)

# ---- Target and factor of each phase ------------------------------------------------------------
fitted, targets, factors = {}, {}, {}
for slot, one in zip(st.columns(len(phases), gap="large"), phases, strict=True):
    with slot:
        share = st.slider(
            f"Target sparsity in {one}, per cent",
            1,
            99,
            50,
            key=f"{one}_target",
            bind="query-params",
        )
        targets[one] = share / 100
        try:
            fitted[one] = calibrations.calibration_of(source, kernel, one, space)
        except ValueError as error:
            st.info(f"No formula: {error}.")
            continue
        low, high = fitted[one].phases[one].fit.range
        if not low <= targets[one] <= high:
            st.info(words.out_of_range(fitted[one].phases[one].fit, targets[one]))
            continue
        factors[one] = fitted[one].scale_factor(targets[one])[one]
        st.markdown(words.factor_line(fitted[one].phases[one], targets[one], factors[one]))

wanted, factor = targets[phase], factors.get(phase)
of_phase = fitted[phase].phases[phase] if phase in fitted else None

chart_slot, table_slot = st.columns([5, 4], gap="large")
with table_slot:
    st.subheader(f"What it means in {phase}", anchor=False)
    if factor is not None and of_phase is not None:
        rows = calibrations.achieved_of(source, fitted[phase], phase, factor)
        st.markdown(words.lengths_table(rows, factor, kernel))
        between = (
            "" if maps.thresholds is None else "; between the thresholds counted, interpolated"
        )
        st.caption(f"Tiles skipped: counted on the texts{between}. {words.above_one_line(factor)}")
    else:
        st.markdown("There is no factor to measure.")
    if of_phase is not None:
        st.markdown(f"{words.formula_line(of_phase)}. {words.layers_line(of_phase)}")

with chart_slot:
    st.subheader(f"Tiles skipped in {phase}", anchor=False)
    layers = len(maps.layers) > 1 and st.toggle(
        "Every layer", True, key="layers", bind="query-params"
    )
    from app import calibration_charts  # the words are on screen before Altair has been imported

    chart, alt = calibration_charts.against_factor(
        calibrations.measured_of(source, kernel, phase),
        None if of_phase is None else of_phase.fit,
        wanted,
        factor,
        layers=layers,
    )
    st.altair_chart(chart, alt=alt)
    st.caption(
        "Lines: mean over texts, layers and heads. The formula is drawn where it was fitted, with "
        "its 95 % band over texts. Grey rules: your target and its factor."
    )

# ---- The setting, to copy -----------------------------------------------------------------------
st.subheader("Take it to a kernel", anchor=False)
if len(factors) == len(fitted) > 0:
    if kernel == "ours" and "prefill" in factors:
        st.markdown("The kernels of this package take the factor as it is:")
        st.code(
            "out = skip_softmax_attention(q, k, v, causal=True, "
            f"threshold_scale_factor={factors['prefill']:.6g})",
            language=None,
            wrap_lines=True,
        )
    engine = choose("Engine", list(ENGINES), "engine")
    calibration = calibrations.joined(fitted)
    try:
        text = export(calibration, engine, {one: targets[one] for one in factors})
    except ValueError as error:
        st.info(f"{error}.")
    else:  # no language: its colours are too faint to read
        if "prefill" in factors and head_dim_of(maps.card) is None:
            st.warning(words.HEAD_DIM_UNKNOWN, icon=":material/warning:")
        st.code(text, language=None, wrap_lines=True)
    st.download_button(
        "This calibration as JSON",
        lambda: to_json(calibration),
        file_name=f"calibration-{kernel}.json",
        mime="application/json",
        icon=":material/download:",
        on_click="ignore",
        help="For `skip-softmax evaluate --calibration`, and `skip-softmax calibrate --explain`.",
    )
else:
    st.markdown("There is nothing to export: a target above has no factor.")

# ---- What skipping costs ------------------------------------------------------------------------
st.subheader("What skipping costs, as recorded", anchor=False)
try:
    report = bundled_evaluation()
except FileNotFoundError:
    st.markdown("No evaluation has been recorded yet; `skip-softmax evaluate` makes one.")
else:
    plot_slot, told_slot = st.columns([5, 4], gap="large")
    with plot_slot:
        drawn = calibration_charts.quality(report, phase, wanted)
        if drawn is None:
            st.markdown(f"The recorded evaluation has nothing about {phase}.")
        else:
            st.altair_chart(drawn[0], alt=drawn[1])
            st.caption(
                f"{phase.capitalize()}. Perplexity against the dense model’s, on held-out texts; "
                f"bars: {report['interval']}. The axis is linear below 0.1 %, logarithmic beyond. "
                "Grey rule: your target."
            )
    with told_slot:
        if report["answers"]["skippable"]:
            st.markdown(
                "Tiles skipped in prefill before the perplexity has risen by so much, with 95 % "
                "intervals:"
            )
            st.markdown(words.skippable_table(report["answers"]["skippable"]))
        st.caption(words.run_line(report))
    st.code(report["command"], language=None, wrap_lines=True)


# ---- Another kernel -----------------------------------------------------------------------------
def other_kernels() -> None:
    """Set the target on each kernel's decisions, and measure it on the others'."""
    st.markdown(
        f"A target of {percent(wanted)} of tiles in {phase}, set on each kernel’s decisions, and "
        "what that factor skips on the others’, over all texts that are long enough for λ ≤ 1:"
    )
    with st.spinner("Counting on every kernel’s decisions"):
        misses = calibrations.misses_of(source, phase, wanted, space)
    named = {one.kernel: decision(target(one.kernel, phase)) for one in misses}
    st.markdown(words.miss_text(misses, named))
    head_dim = head_dim_of(maps.card)
    if phase == "prefill" and head_dim is not None:
        st.markdown(hopper_line(head_dim))


section("The same target on another kernel", "misses", ":material/compare_arrows:", other_kernels)
with st.expander("What am I looking at?", icon=":material/help:"):
    st.markdown(words.EXPLANATION)
with st.expander("Where these gap maps come from", icon=":material/description:"):
    for field, said in maps.card.items():
        st.text(f"{field}: {said}")
    for title in dict.fromkeys(sample.text for sample in maps.samples):
        st.text(f"text: {title}")
