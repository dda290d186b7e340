// The lanes: a cache shared among splits, and the votes of the heads that share it.
//
// Python sends the gap of every tile, for the group and for each head, and for every position of the
// slider the headline and the counts.  What the user does goes back as triggers: "threshold", "tile".

const LANES_HEIGHT = 260, LANE = [6, 26], VOTE_LANE = 18; // CSS pixels
const VETO = [213, 94, 0];

class LanesView {
  constructor(root) {
    this.root = root;
    for (const name of ["headline", "legend", "counts", "reading", "passage", "splits-title", "map"]) {
      this[name] = root.querySelector(`.${name}`);
    }
    this.slider = new ThresholdSlider(root, () => this.paint());
    [this.canvas, this.overlay] = this.map.children;
    this.votes = root.querySelector(".votes-map canvas");
    this.axes = { top: root.querySelector(".axis.top"), splits: root.querySelector(".splits"),
      heads: root.querySelector(".heads-axis") };
    this.cursor = null;
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(root);
    for (const canvas of [this.canvas, this.votes]) {
      canvas.onpointermove = (event) => this.show(this.at(event));
      canvas.onpointerleave = () => this.show(null);
      canvas.onclick = (event) => this.select(this.at(event));
    }
    this.map.onkeydown = (event) => this.key(event);
    this.map.onfocus = () => { if (this.map.matches(":focus-visible")) this.show(this.cursor ?? this.selected); };
    this.map.onblur = () => this.show(null);
  }

  destroy() {
    this.observer.disconnect();
    this.slider.destroy();
    clearTimeout(this.readingTimer);
  }

  update(data, trigger) {
    this.trigger = trigger;
    this.data = data;
    this.slider.update(data, trigger);
    this.tiles = decodeTiles(data); // of the group: gap [tiles]
    this.heads = data.heads.map(decodeTiles);
    this.lanesOf = Array.from({ length: data.splits }, () => []);
    data.visit.forEach((j) => this.lanesOf[data.split_of[j]].push(j));
    this.selected = data.selected;
    this.dark = isDark(this.root);
    this.root.classList.toggle("dark", this.dark);
    this.map.setAttribute("aria-label", data.label);
    setText(this["splits-title"], data.title);
    this.buildLegend();
    this.resize();
  }

  buildLegend() {
    const entries = [["computed", "computed: its V is read"], ["skipped", "skipped: its V is not read"],
      this.data.seeded ? ["seed", "gives the seed"] : ["first", "first of its split: never skipped"],
      ["veto", "a head’s veto; hatched where it votes skip"]];
    this.legend.replaceChildren(...entries.map(([name, text]) => {
      const item = make("li");
      make("i", name, item);
      make("span", "", item).textContent = text;
      return item;
    }));
  }

  resize() {
    const width = this.root.clientWidth;
    if (!width || !this.data) return;
    this.root.classList.toggle("narrow", width < 480);
    const ratio = Math.max(1, window.devicePixelRatio || 1), { key_tiles: n, splits } = this.data;
    const room = Math.max(120, width - 44);
    const w = Math.max(1, Math.floor((room * ratio) / n));
    const lane = Math.min(LANE[1], Math.max(LANE[0], Math.floor(LANES_HEIGHT / splits)));
    this.size = { ratio, w, lane, cssWidth: Math.min(room, (w * n) / ratio) };
    this.mark(this.axes.splits, splits, lane, (s) => `${s}`);
    this.axes.splits.firstChild.textContent = "split 0";
    this.mark(this.axes.heads, this.heads.length, VOTE_LANE, (h) => this.heads[h].short);
    this.buildTop();
    this.paint();
  }

  /** Labels beside lanes: as many as there is room for. */
  mark(axis, count, lane, text) {
    axis.style.height = `${count * lane}px`;
    const step = Math.ceil(14 / lane);
    axis.replaceChildren(...Array.from({ length: Math.ceil(count / step) }, (_, n) => {
      const mark = make("span");
      mark.style.top = `${(n * step + 0.5) * lane}px`;
      mark.textContent = text(n * step);
      return mark;
    }));
  }

  buildTop() {
    const { keys, key_tiles: n, length } = this.data, { cssWidth } = this.size;
    this.axes.top.style.width = `${cssWidth}px`;
    const most = Math.max(1, Math.floor(cssWidth / 90)), total = n * keys;
    const step = Math.max(keys, 2 ** Math.ceil(Math.log2(total / most)));
    const marks = [];
    for (let at = 0; at < total - step / 2; at += step) marks.push([at, at ? at.toLocaleString("en") : "key 0"]);
    marks.push([total, (length - 1).toLocaleString("en")]);
    this.axes.top.replaceChildren(...marks.map(([at, text]) => {
      const mark = make("span");
      mark.style.left = `${(at / total) * cssWidth}px`;
      mark.textContent = text;
      return mark;
    }));
  }

  paint() {
    const { step, ln } = this.slider, { data, size } = this;
    this.slider.paint();
    setSentence(this.headline, data.headline[step]);
    this.paintLanes(ln);
    this.paintVotes(ln);
    this.paintCursor();
    if (this.counts.childElementCount !== this.heads.length) {
      this.counts.replaceChildren(...this.heads.map(() => make("li")));
    }
    this.heads.forEach((head, h) => setText(this.counts.children[h], head.counts[step]));
    this.describe();
  }

  cell(context, x, y, width, height, colour, strokes) {
    context.fillStyle = css(colour);
    context.fillRect(x, y, width, height);
    if (!strokes) return;
    context.fillStyle = strokes;
    context.fillRect(x, y, width, height);
  }

  paintLanes(ln) {
    const { data, size: { ratio, w, lane, cssWidth } } = this, h = Math.round(lane * ratio);
    sizeCanvas(this.canvas, w * data.key_tiles, h * data.splits, cssWidth, (h * data.splits) / ratio);
    const context = this.canvas.getContext("2d"), colours = palette(this.dark);
    const line = w >= 4 * ratio ? Math.round(ratio) : 0;
    context.fillStyle = css(colours[MASKED]);
    context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    const strokes = w >= HATCH_FROM * ratio ? hatch(context, ratio) : null;
    for (let s = 0; s < data.splits; s++) {
      this.lanesOf[s].forEach((j, place) => {
        const state = stateOf(this.tiles, j, ln), x = j * w, y = s * h;
        this.cell(context, x, y, w - line, h - line, colours[state], state === SKIPPED ? strokes : null);
        if (data.seeded ? j === 0 || j === data.key_tiles - 1 : place === 0) {
          context.fillStyle = "#fff";
          if (data.seeded) {
            context.beginPath();
            context.arc(x + (w - line) / 2, y + (h - line) / 2, Math.min(w, h) / 5, 0, 2 * Math.PI);
            context.fill();
          } else if (w >= 4 * ratio) {
            context.fillRect(x + Math.round(ratio), y, Math.max(Math.round(2 * ratio), w >> 3), h - line);
          }
        }
      });
    }
  }

  paintVotes(ln) {
    const { data, size: { ratio, w, cssWidth } } = this, h = Math.round(VOTE_LANE * ratio);
    const height = h * this.heads.length;
    sizeCanvas(this.votes, w * data.key_tiles, height, cssWidth, height / ratio);
    const context = this.votes.getContext("2d"), colours = palette(this.dark);
    const line = w >= 4 * ratio ? Math.round(ratio) : 0;
    context.clearRect(0, 0, this.votes.width, height);
    const strokes = w >= HATCH_FROM * ratio ? hatch(context, ratio) : null;
    this.heads.forEach((head, n) => {
      for (let j = 0; j < data.key_tiles; j++) {
        const agrees = stateOf(head, j, ln) === SKIPPED;
        this.cell(context, j * w, n * h, w - line, h - line, agrees ? colours[SKIPPED] : VETO,
          agrees ? strokes : null);
      }
    });
  }

  paintCursor() {
    const { data, size: { ratio, w, lane, cssWidth } } = this, h = Math.round(lane * ratio);
    sizeCanvas(this.overlay, w * data.key_tiles, h * data.splits, cssWidth, (h * data.splits) / ratio);
    const context = this.overlay.getContext("2d");
    context.clearRect(0, 0, this.overlay.width, this.overlay.height);
    const outline = (j, inner) => {
      const wide = Math.max(w, 4 * ratio);
      const box = [j * w - ratio, data.split_of[j] * h - ratio, wide + ratio, h + ratio];
      for (const [thick, colour] of [[4, "#fff"], [2, inner]]) {
        context.lineWidth = thick * ratio;
        context.strokeStyle = colour;
        context.strokeRect(...box);
      }
    };
    if (this.cursor !== null) {
      context.fillStyle = "rgba(128, 128, 128, 0.25)";
      context.fillRect(this.cursor * w, 0, w, this.overlay.height);
    }
    outline(this.selected, "#d55e00");
    if (this.cursor !== null) outline(this.cursor, "#000");
  }

  at(event) {
    const box = event.currentTarget.getBoundingClientRect(), { key_tiles: n } = this.data;
    return Math.min(n - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * n)));
  }

  show(cursor) {
    this.cursor = cursor;
    this.paintCursor();
    this.describe();
  }

  select(j) {
    this.selected = j;
    this.show(j);
    this.trigger("tile", j);
  }

  key(event) {
    const here = this.cursor ?? this.selected, last = this.data.key_tiles - 1;
    const lane = this.lanesOf[this.data.split_of[here]], place = lane.indexOf(here);
    const to = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: last,
      ArrowUp: lane[place - 1] ?? here, ArrowDown: lane[place + 1] ?? here }[event.key];
    if (to !== undefined) this.show(Math.min(last, Math.max(0, to)));
    else if (event.key === "Enter" || event.key === " ") this.select(here);
    else return;
    event.preventDefault();
  }

  /** Say what is known about the tile under the cursor, or the selected one. */
  describe() {
    const { data } = this, { ln } = this.slider, j = this.cursor ?? this.selected;
    const lane = this.lanesOf[data.split_of[j]], state = STATE[stateOf(this.tiles, j, ln)];
    const [first, stop] = [j * data.keys, Math.min((j + 1) * data.keys, data.length)];
    const vetoes = this.heads.filter((head) => stateOf(head, j, ln) === COMPUTED);
    const each = vetoes.map((head) => `${head.name} (${reason(head, j, ln)})`).join(", ");
    const vote = this.tiles.gap[j] === Infinity ? "first of its split, never skipped"
      : vetoes.length ? `vetoed by ${each}`
        : `all heads agree; ${reason(this.tiles, j, ln)}`;
    const keys = `keys ${first.toLocaleString("en")} – ${(stop - 1).toLocaleString("en")}`;
    const where = data.splits > 1 ? `split ${data.split_of[j]}, ` : "";
    const text = `Tile ${j}, ${keys}, ${where}${lane.indexOf(j) + 1} of ${lane.length} visited: ${state}; ${vote}.`;
    clearTimeout(this.readingTimer);
    this.readingTimer = setTimeout(() => setText(this.reading, text), 120);
    setText(this.passage, words(data.words, first, stop));
  }
}

const views = new WeakMap();

export default function (component) {
  const root = component.parentElement.querySelector(".lanes");
  if (!views.has(root)) views.set(root, new LanesView(root));
  const view = views.get(root);
  view.update(component.data, component.setTriggerValue);
  return () => {
    view.destroy();
    views.delete(root);
  };
}
