// The stepper: one query group's visit, phase by phase, with no server in between.
//
// Python sends what every row held after every tile; a position is a tile of the visit and a phase
// of it.  Nothing is decided here.

const NAMES = [["tileMax", "tile max"], ["m", "running max m"], ["gap", "tile max − m"],
  ["alpha", "alpha"], ["l", "running sum l"], ["u", "left out, at most u"], ["share", "bound u ÷ (l + u)"]];
const BASE_DELAY = 900; // milliseconds a phase is shown at speed 1
const STRIP = 26, ROWS = 190, LEFT = 36; // CSS pixels
const VETO = "#d55e00";

/** Three digits, as Python's plain_number writes them. */
function short(x) {
  if (!Number.isFinite(x)) return number(x);
  if (x === 0) return "0";
  if (x >= 1e-3 && x < 1e5) return String(Number(x.toPrecision(3)));
  const [mantissa, power] = x.toExponential(2).split("e");
  const digits = "⁰¹²³⁴⁵⁶⁷⁸⁹";
  const raised = [...String(Math.abs(power))].map((d) => digits[d]).join("");
  return `${Number(mantissa)} × 10${power < 0 ? "⁻" : ""}${raised}`;
}

class StepperView {
  constructor(root) {
    this.root = root;
    for (const name of ["play", "scrub", "status", "stage", "strip", "rows", "numbers", "pseudo", "kernel",
      "speed", "strip-caption", "rows-caption", "row-caption"]) {
      this[name] = root.querySelector(`.${name}`);
    }
    this.at = 0;
    this.timer = null;
    root.querySelector(".tile-back").onclick = () => this.byTile(-1);
    root.querySelector(".back").onclick = () => this.go(this.at - 1);
    root.querySelector(".forth").onclick = () => this.go(this.at + 1);
    root.querySelector(".tile-forth").onclick = () => this.byTile(1);
    this.play.onclick = () => this.toggle();
    this.speed.onchange = () => { if (this.timer) { this.pause(); this.toggle(); } };
    this.scrub.oninput = () => this.go(Number(this.scrub.value));
    this.stage.onkeydown = (event) => this.key(event);
    this.strip.onclick = (event) => this.clickTile(event);
    this.rows.onclick = (event) => this.clickRow(event);
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) this.speed.value = "0.5";
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(root);
  }

  destroy() {
    this.pause();
    this.observer.disconnect();
  }

  update(data) {
    const first = this.data?.name !== data.name;
    this.data = data;
    this.dark = isDark(this.root);
    const of = Object.fromEntries(["tile_max", "gap", "m", "l", "u", "alpha"].map(
      (name) => [name, decode(data[name], Float32Array)]));
    this.of = { ...of, vote: decode(data.vote, Uint8Array) };
    this.positions = data.steps.flatMap((step, s) =>
      ["scores", "vote", ...(step.skipped ? ["skip"] : ["softmax", "values"])].map((phase) => ({ s, phase })));
    this.positions.push({ s: data.steps.length - 1, phase: "output" });
    if (first) {
      this.pause();
      this.at = 0;
      this.row = data.row;
    }
    this.at = Math.min(this.at, this.positions.length - 1);
    this.row = Math.min(this.row, data.rows - 1);
    this.scrub.max = this.positions.length - 1;
    this.list(this.pseudo, data.pseudo);
    this.list(this.kernel, data.kernel);
    this.stage.setAttribute("aria-label", `Visit of query group ${data.group}`);
    this.scaleRows();
    this.resize();
  }

  list(box, { lines, first_number: first }) {
    const code = make("code");
    lines.forEach((text, n) => {
      const line = make("span", "line", code);
      line.dataset.number = first + n;
      line.textContent = text || " ";
    });
    box.replaceChildren(code);
  }

  // ---- Where we are --------------------------------------------------------------------------

  go(at) {
    const next = Math.min(Math.max(at, 0), this.positions.length - 1);
    if (next !== at) this.pause();
    this.at = next;
    this.paint();
  }

  /** To the beginning of the next tile, or of this one and then of the one before. */
  byTile(direction) {
    const { s, phase } = this.positions[this.at];
    const target = direction > 0 ? s + 1 : phase === "scores" ? s - 1 : s;
    const found = this.positions.findIndex((one) => one.s === target && one.phase === "scores");
    this.go(found >= 0 ? found : direction > 0 ? this.positions.length - 1 : 0);
  }

  toggle() {
    if (this.timer) return this.pause();
    if (this.at === this.positions.length - 1) this.at = -1;
    this.timer = setInterval(() => {
      this.at += 1;
      if (this.at === this.positions.length - 1) this.pause();
      this.paint();
    }, BASE_DELAY / Number(this.speed.value));
    this.play.textContent = "Pause";
    this.go(this.at + 1);
  }

  pause() {
    clearInterval(this.timer);
    this.timer = null;
    this.play.textContent = "Play";
  }

  key(event) {
    const { key } = event;
    if (key === "ArrowRight") this.go(this.at + 1);
    else if (key === "ArrowLeft") this.go(this.at - 1);
    else if (key === "PageDown") this.byTile(1);
    else if (key === "PageUp") this.byTile(-1);
    else if (key === "Home") this.go(0);
    else if (key === "End") this.go(this.positions.length - 1);
    else if (key === "ArrowUp") this.choose(this.row - 1);
    else if (key === "ArrowDown") this.choose(this.row + 1);
    else if (key === " " || key === "Enter") this.toggle();
    else return;
    event.preventDefault();
  }

  choose(row) {
    this.row = Math.min(Math.max(row, 0), this.data.rows - 1);
    this.paint();
  }

  clickTile(event) {
    const box = this.strip.getBoundingClientRect();
    const j = Math.floor(((event.clientX - box.left) / box.width) * this.data.key_tiles);
    const s = this.data.steps.findIndex((step) => step.j === j);
    if (s >= 0) this.go(this.positions.findIndex((one) => one.s === s && one.phase === "vote"));
  }

  clickRow(event) {
    const box = this.rows.getBoundingClientRect();
    this.choose(Math.floor(((event.clientX - box.left - LEFT) / (box.width - LEFT)) * this.data.rows));
  }

  // ---- What is shown -------------------------------------------------------------------------

  /** Value of one row: what the phase has changed is that of this tile, the rest of the one before. */
  value(name, row, { s, phase }) {
    const after = s * this.data.rows + row, before = after - this.data.rows;
    const started = s > 0, start = name === "m" ? -Infinity : 0;
    if (name === "tile_max" || name === "gap") return this.of[name][after];
    const changed = phase === "skip" || phase === "softmax" || phase === "values" || phase === "output";
    if (name === "alpha") return changed && phase !== "skip" ? this.of.alpha[after] : NaN;
    return changed ? this.of[name][after] : started ? this.of[name][before] : start;
  }

  resize() {
    const width = this.root.clientWidth;
    if (!width || !this.data) return;
    this.root.classList.toggle("wide", width >= 700);
    this.ratio = Math.max(1, window.devicePixelRatio || 1);
    this.paint();
  }

  paint() {
    if (!this.ratio) return;
    const here = this.positions[this.at], step = this.data.steps[here.s];
    this.scrub.value = this.at;
    this.scrub.setAttribute("aria-valuetext", `tile ${here.s + 1} of ${this.data.steps.length}, ${here.phase}`);
    this.paintStrip(here);
    this.paintRows(here, step);
    this.tell(here, step);
    this.light(this.pseudo, this.data.pseudo.lit[here.phase]);
    this.light(this.kernel, this.data.kernel.lit[here.phase]);
  }

  tell({ s, phase }, step) {
    const { data } = this;
    const veto = step.vetoes === 1 ? "1 row vetoes" : `${step.vetoes} rows veto`;
    const result = step.forced ? `overruled by hand: ${step.skipped ? "skipped" : "kept"}`
      : step.skipped ? `all ${data.rows} agree, skipped` : `${veto}, kept`;
    const [, says] = data.phases.find(([name]) => name === phase);
    const where = phase === "output" ? `After ${data.steps.length} tiles`
      : `Tile ${s + 1} of ${data.steps.length}, key tile ${step.j}`;
    const known = phase === "scores" || phase === "output" ? "" : ` Vote: ${result}.`;
    const heading = make("b");
    heading.textContent = `${where}. `;
    const sentence = says + known;
    if (this.status.textContent !== heading.textContent + sentence) {
      this.status.setAttribute("aria-live", this.timer ? "off" : "polite");
      this.status.replaceChildren(heading, sentence);
    }
    setText(this["strip-caption"], `Key tiles 0 – ${data.key_tiles - 1}, those visited so far: `
      + "blue computed, hatched skipped");
    setText(this["rows-caption"], `All ${data.rows} rows: dots, their tile max (a triangle vetoes); `
      + "line, running max m; dashes, m + ln λ");
    const row = data.first_row + this.row, word = data.words[this.row];
    setText(this["row-caption"], `Query row ${row.toLocaleString("en")}${word ? ` “${word}”` : ""} `
      + "(click another, or arrow keys up and down)");
    this.tabulate({ s, phase });
  }

  tabulate(here) {
    const before = this.at > 0 ? this.positions[this.at - 1] : null;
    const shown = (name, at) => {
      if (name === "share") {
        const l = this.value("l", this.row, at), u = this.value("u", this.row, at);
        return u > 0 ? short(u === Infinity ? 1 : u / (l + u)) : "0";
      }
      if (name === "tileMax") return number(this.value("tile_max", this.row, at));
      if (name === "gap") {
        if (at.phase === "scores") return "–";
        return number(this.value("gap", this.row, at));
      }
      const x = this.value(name, this.row, at);
      if (Number.isNaN(x)) return "–";
      return name === "m" ? number(x) : short(x);
    };
    if (this.numbers.childElementCount !== NAMES.length) {
      this.numbers.replaceChildren(...NAMES.map(([, label]) => {
        const line = make("tr");
        const head = make("th", "", line);
        head.scope = "row";
        head.textContent = label;
        make("td", "", line);
        return line;
      }));
    }
    NAMES.forEach(([name], n) => {
      const cell = this.numbers.children[n].lastChild, text = shown(name, here);
      cell.classList.toggle("changed", before !== null && text !== "–" && text !== shown(name, before));
      setText(cell, text);
    });
  }

  light(box, [first, last]) {
    const lines = box.firstChild.children;
    for (let n = 0; n < lines.length; n++) lines[n].classList.toggle("lit", n >= first && n <= last);
    const line = lines[first];
    const top = line.offsetTop - 24;
    if (line.offsetTop < box.scrollTop || lines[last].offsetTop + 20 > box.scrollTop + box.clientHeight) {
      box.scrollTop = top;
    }
  }

  paintStrip({ s, phase }) {
    const { data, ratio } = this, canvas = this.strip;
    const cssWidth = this.stage.clientWidth;
    const width = Math.round(cssWidth * ratio), height = Math.round(STRIP * ratio);
    sizeCanvas(canvas, width, height, cssWidth, STRIP);
    const context = canvas.getContext("2d"), colours = palette(this.dark), strokes = hatch(context, ratio);
    context.clearRect(0, 0, width, height);
    const edge = (j) => Math.round((j * width) / data.key_tiles);
    const decided = phase === "scores" || phase === "vote" ? s : s + 1;
    const state = new Array(data.key_tiles).fill(MASKED);
    data.steps.forEach((step, n) => { if (n < decided) state[step.j] = step.skipped ? SKIPPED : COMPUTED; });
    for (let j = 0; j < data.key_tiles; j++) {
      const box = [edge(j), 0, Math.max(1, edge(j + 1) - edge(j) - Math.round(ratio)), height];
      context.fillStyle = css(colours[state[j]]);
      context.fillRect(...box);
      if (state[j] !== SKIPPED) continue;
      context.fillStyle = strokes;
      context.fillRect(...box);
    }
    if (phase === "output") return;
    const { j } = data.steps[s], line = 3 * ratio;
    const box = [edge(j) + line / 2, line / 2, Math.max(line, edge(j + 1) - edge(j) - line), height - line];
    for (const [thick, colour] of [[line, this.dark ? "#000" : "#fff"], [line / 2, VETO]]) {
      context.lineWidth = thick;
      context.strokeStyle = colour;
      context.strokeRect(...box);
    }
  }

  /** One scale of scores for the whole visit, so that m is seen to rise. */
  scaleRows() {
    let low = Infinity, high = -Infinity;
    for (const x of this.of.tile_max) {
      if (x > -Infinity && x < low) low = x;
      if (x > high) high = x;
    }
    if (this.data.ln !== null) low = Math.min(low, high + this.data.ln);
    const pad = 0.06 * (high - low || 1);
    this.low = low - pad;
    this.high = high + pad;
  }

  paintRows(here, step) {
    const { data, ratio } = this, canvas = this.rows, { rows } = data;
    const cssWidth = canvas.parentElement.clientWidth;
    sizeCanvas(canvas, Math.round(cssWidth * ratio), Math.round(ROWS * ratio), cssWidth, ROWS);
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, cssWidth, ROWS);
    const ink = getComputedStyle(this.root).color;
    const x = (r) => LEFT + ((r + 0.5) * (cssWidth - LEFT)) / rows;
    const y = (v) => ROWS - ((v - this.low) / (this.high - this.low)) * ROWS;
    context.font = "12px sans-serif";
    context.textBaseline = "middle";
    const tick = niceTick((this.high - this.low) / 5);
    for (let v = Math.ceil(this.low / tick) * tick; v <= this.high; v += tick) {
      context.globalAlpha = 0.15;
      context.fillStyle = ink;
      context.fillRect(LEFT, Math.round(y(v)), cssWidth, 1);
      context.globalAlpha = 0.75;
      context.fillText(String(Number(v.toFixed(6))).replace("-", "−"), 0, Math.min(ROWS - 7, Math.max(7, y(v))));
    }
    context.globalAlpha = 0.12;
    context.fillRect(x(this.row) - (cssWidth - LEFT) / rows / 2, 0, Math.max(3, (cssWidth - LEFT) / rows), ROWS);
    context.globalAlpha = 1;
    const width = (cssWidth - LEFT) / rows;
    const across = (shift, dash) => {
      context.strokeStyle = ink;
      context.lineWidth = 1.5;
      context.setLineDash(dash);
      context.beginPath();
      for (let r = 0; r < rows; r++) {
        const m = this.value("m", r, here);
        if (m === -Infinity) continue;
        context.moveTo(x(r) - width / 2, y(m + shift));
        context.lineTo(x(r) + width / 2, y(m + shift));
      }
      context.stroke();
      context.setLineDash([]);
    };
    across(0, []);
    if (data.ln !== null) across(data.ln, [3, 2]);
    if (here.phase === "output") return;
    for (let r = 0; r < rows; r++) {
      const top = this.value("tile_max", r, here);
      if (top === -Infinity) continue;
      const vetoes = here.phase !== "scores" && !this.of.vote[here.s * rows + r];
      context.fillStyle = here.phase === "scores" ? ink : vetoes ? VETO : this.dark ? "#56b4e9" : "#0072b2";
      context.beginPath();
      if (vetoes) {
        context.moveTo(x(r), y(top) - 5);
        context.lineTo(x(r) + 4.5, y(top) + 4);
        context.lineTo(x(r) - 4.5, y(top) + 4);
      } else {
        context.arc(x(r), y(top), 3, 0, 7);
      }
      context.fill();
    }
  }
}

function niceTick(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return [1, 2, 5, 10].map((n) => n * power).find((tick) => tick >= least);
}

const steppers = new WeakMap();

export default function (component) {
  const root = component.parentElement.querySelector(".stepper");
  if (!steppers.has(root)) steppers.set(root, new StepperView(root));
  const view = steppers.get(root);
  view.update(component.data);
  return () => {
    view.destroy();
    steppers.delete(root);
  };
}
