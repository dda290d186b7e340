// The tile map: λ slider, headlines, thumbnails and maps that follow it with no server in between.
//
// Python sends, for every position of the slider, ln λ, the headline and the counts.  What the user
// does goes back as triggers: "threshold" (on release), "head", "cell".

const KEY_STEP = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
  PageUp: [-8, 0], PageDown: [8, 0] };
const NARROW = 480, WIDE = 700; // CSS pixels of the component

class TileMapView {
  constructor(root) {
    this.root = root;
    for (const name of ["headlines", "heads", "panels", "reading", "tooltip"]) {
      this[name] = root.querySelector(`.${name}`);
    }
    this.slider = new ThresholdSlider(root, () => this.paint());
    this.cursor = null;
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(root);
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
    this.selected = data.selected;
    this.dark = isDark(this.root);
    this.root.classList.toggle("dark", this.dark);
    this.root.classList.toggle("two", data.panels.length > 1);
    this.buildHeads();
    this.buildPanels();
    const { groups, key_tiles: keyTiles } = this.views[0].tiles;
    if (this.cursor && (this.cursor.i >= groups || this.cursor.j >= keyTiles)) this.leave();
    this.resize();
  }

  buildHeads() {
    const heads = this.data.heads.map(decodeTiles);
    if (this.heads.childElementCount !== heads.length) {
      this.heads.replaceChildren(...heads.map((_, n) => {
        const button = make("button", "head");
        button.type = "button";
        make("canvas", "", button).setAttribute("aria-hidden", "true");
        make("b", "", button);
        make("span", "", button);
        button.onclick = () => this.trigger("head", this.thumbnails[n].head);
        return button;
      }));
    }
    this.thumbnails = heads;
    heads.forEach((tiles, n) => {
      const button = this.heads.children[n];
      setText(button.querySelector("b"), tiles.label);
      button.title = tiles.label;
      button.setAttribute("aria-pressed", String(tiles.head === this.data.head));
    });
  }

  buildPanels() {
    const panels = this.data.panels;
    if (this.views?.length !== panels.length) {
      this.headlines.replaceChildren();
      this.panels.replaceChildren();
      this.views = panels.map((_, n) => this.buildPanel(n));
    }
    this.views.forEach((view, n) => {
      view.tiles = decodeTiles(panels[n]);
      view.map.setAttribute("aria-label", panels[n].label);
      setText(view.title, panels[n].title);
      setText(view.headlineTitle, panels[n].title);
      view.headlineTitle.hidden = view.title.hidden = panels.length < 2;
      view.rowTitle.hidden = view.rowPlot.hidden = !view.tiles.mass;
      if (view.tiles.mass) {
        view.rowTitle.replaceChildren(document.createTextNode(panels[n].row_title));
        if (panels[n].row_word) make("q", "", view.rowTitle).textContent = panels[n].row_word;
        view.bars.setAttribute("aria-label", panels[n].row_label);
      }
    });
  }

  buildPanel(n) {
    const headline = make("p", "headline", this.headlines);
    const headlineTitle = make("span", "title", headline);
    const sentence = make("span", "sentence", headline);
    const panel = make("section", "panel", this.panels);
    const title = make("span", "title", panel);
    const plot = make("div", "plot", panel);
    make("div", "axis corner", plot);
    const top = make("div", "axis top", plot);
    const left = make("div", "axis left", plot);
    const map = make("div", "map", plot);
    top.setAttribute("aria-hidden", "true");
    left.setAttribute("aria-hidden", "true");
    map.tabIndex = 0;
    map.setAttribute("role", "application");
    map.setAttribute("aria-describedby", "help");
    const canvas = make("canvas", "", map);
    const overlay = make("canvas", "overlay", map);
    const legend = make("ul", "legend", panel);
    const counts = ["computed", "skipped", "masked"].map((state) => {
      const item = make("li", "", legend);
      make("i", state, item);
      return make("span", "", item);
    });
    const meaning = make("li", "meaning", legend);
    const rowTitle = make("p", "row-title", panel);
    const rowPlot = make("div", "plot", panel);
    const rowAxis = make("div", "axis left", rowPlot);
    rowAxis.setAttribute("aria-hidden", "true");
    for (const text of ["100 %", "1 %", "0.01 %", "0.0001 %"]) make("span", "", rowAxis).textContent = text;
    [...rowAxis.children].forEach((tick, t) => { tick.style.top = `${(100 * t) / 3}%`; });
    const bars = make("canvas", "bars", rowPlot);
    bars.setAttribute("role", "img");
    map.onpointermove = (event) => this.point(n, event);
    map.onpointerleave = () => this.leave();
    map.onclick = (event) => { this.point(n, event); this.select(); };
    map.onkeydown = (event) => this.key(n, event);
    map.onfocus = () => { if (map.matches(":focus-visible")) this.show(n, this.cursor ?? this.selected); };
    map.onblur = () => this.leave();
    return { headlineTitle, sentence, title, plot, top, left, map, canvas, overlay, counts, meaning,
      rowTitle, rowPlot, bars };
  }

  resize() {
    const width = this.root.clientWidth;
    if (!width || !this.data) return;
    this.root.classList.toggle("narrow", width < NARROW);
    this.root.classList.toggle("wide", width >= WIDE);
    const ratio = Math.max(1, window.devicePixelRatio || 1);
    for (const view of this.views) {
      view.size = measure(view.tiles, Math.max(120, view.plot.clientWidth - 44), ratio);
      this.buildAxes(view);
    }
    this.paint();
  }

  buildAxes({ tiles, size, top, left }) {
    const ticks = (axis, length, extent, property, unit) => {
      axis.style[property === "left" ? "width" : "height"] = `${extent}px`;
      const room = Math.max(1, Math.floor(extent / 90));
      const step = niceStep(length / room);
      const marks = [];
      for (let at = 0; at < length - step / 2; at += step) marks.push(at);
      marks.push(length);
      axis.replaceChildren(...marks.map((at) => {
        const mark = make("span");
        mark.style[property] = `${(at / length) * extent}px`;
        mark.textContent = at === 0 ? unit : at.toLocaleString("en");
        return mark;
      }));
    };
    ticks(top, tiles.keys_total, size.cssWidth, "left", "key 0");
    ticks(left, tiles.queries_total, size.cssHeight, "top", "row 0");
  }

  paint() {
    const { step, ln } = this.slider;
    this.slider.paint();
    const ink = getComputedStyle(this.root).color;
    for (const view of this.views) {
      const { tiles, size } = view;
      setSentence(view.sentence, tiles.headline[step]);
      paintMap(view.canvas, tiles, size, ln, this.dark);
      [tiles.visited - tiles.skipped[step], tiles.skipped[step], tiles.masked].forEach((count, state) => {
        const name = [STATE[COMPUTED], STATE[SKIPPED], STATE[MASKED]][state];
        setText(view.counts[state], `${name} ${count.toLocaleString("en")}`);
      });
      setText(view.meaning, `sparsity ${tiles.sparsity[step]} = skipped ÷ visited tiles`);
      if (tiles.mass) paintBars(view.bars, tiles, size, ln, this.dark, ink);
      this.paintCursor(view);
    }
    this.thumbnails.forEach((tiles, n) => {
      const button = this.heads.children[n];
      paintThumbnail(button.querySelector("canvas"), tiles, ln, this.dark);
      setText(button.querySelector("span"), `${tiles.sparsity[step]} skipped`);
    });
    if (this.cursor && !this.tooltip.hidden) this.describe(this.active);
  }

  paintCursor(view) {
    paintOverlay(view.overlay, view.tiles, view.size, this.cursor, this.selected);
  }

  point(n, event) {
    const view = this.views[n];
    const box = view.canvas.getBoundingClientRect();
    const at = (share, count) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
    this.show(n, {
      i: at((event.clientY - box.top) / box.height, view.tiles.groups),
      j: at((event.clientX - box.left) / box.width, view.tiles.key_tiles),
    });
  }

  show(n, cursor) {
    this.active = n;
    this.cursor = cursor;
    for (const view of this.views) this.paintCursor(view);
    this.describe(n);
  }

  leave() {
    this.cursor = null;
    this.tooltip.hidden = true;
    for (const view of this.views) this.paintCursor(view);
  }

  key(n, event) {
    const { tiles } = this.views[n];
    const at = this.cursor ?? this.selected;
    let { i, j } = at;
    if (event.key in KEY_STEP) {
      i += KEY_STEP[event.key][0];
      j += KEY_STEP[event.key][1];
    } else if (event.key === "Home") {
      j = 0;
    } else if (event.key === "End") {
      j = tiles.key_tiles - 1;
      while (j > 0 && tiles.gap[i * tiles.key_tiles + j] === -Infinity) j--;
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.show(n, at);
      return this.select();
    } else {
      if (event.key === "Escape") this.tooltip.hidden = true;
      return;
    }
    event.preventDefault();
    this.show(n, {
      i: Math.min(tiles.groups - 1, Math.max(0, i)),
      j: Math.min(tiles.key_tiles - 1, Math.max(0, j)),
    });
  }

  select() {
    this.selected = this.cursor;
    for (const view of this.views) this.paintCursor(view);
    const { tiles } = this.views[this.active];
    this.trigger("cell", { i: this.cursor.i * tiles.pooled[0], j: this.cursor.j * tiles.pooled[1] });
  }

  /** Fill the tooltip and the line that screen readers hear. */
  describe(n) {
    const view = this.views[n], { tiles } = view, { i, j } = this.cursor;
    const index = i * tiles.key_tiles + j, ln = this.slider.ln;
    const state = STATE[stateOf(tiles, index, ln)];
    const [rows, keys] = tiles.tokens_per_cell, first = this.data.first_query;
    const queries = [i * rows, Math.min((i + 1) * rows, tiles.queries_total)];
    const range = [j * keys, Math.min((j + 1) * keys, tiles.keys_total)];
    const name = `Tile (${i * tiles.pooled[0]}, ${j * tiles.pooled[1]})`;
    clearTimeout(this.readingTimer);
    this.readingTimer = setTimeout(
      () => setText(this.reading, `${name}: ${state}; ${reason(tiles, index, ln)}.`), 120);

    const box = this.tooltip;
    box.replaceChildren();
    make("div", "state", box).textContent = `${name}: ${state}`;
    make("div", "", box).textContent = reason(tiles, index, ln);
    if (state !== "masked" && tiles.tileMax && !tiles.byHand.has(index)) {
      const list = make("dl", "", box);
      const fact = (term, text) => {
        make("dt", "", list).textContent = term;
        make("dd", "", list).textContent = text;
      };
      const word = words(this.data.words, ...[0, 1].map((n) => tiles.row[index] + n + first));
      fact("decided by", `query row ${tiles.row[index].toLocaleString("en")}${word ? ` “${word}”` : ""}`);
      fact("tile max", number(tiles.tileMax[index]));
      fact("running max m", number(tiles.tileMax[index] - tiles.gap[index]));
    }
    const passage = (label, [start, stop], offset) => {
      make("div", "words-label", box).textContent =
        `${label} ${start.toLocaleString("en")} – ${(stop - 1).toLocaleString("en")}`;
      const text = words(this.data.words, start + offset, stop + offset);
      if (text) make("div", "words", box).textContent = text;
    };
    passage("keys", range, 0);
    passage("queries", queries, first);
    box.hidden = false;
    this.place(box, view, i, j);
  }

  /** To the right of the tile and above it, where a causal map is empty, if there is room. */
  place(box, view, i, j) {
    const map = view.canvas.getBoundingClientRect(), { offsetWidth: width, offsetHeight: height } = box;
    const cell = { width: map.width / view.tiles.key_tiles, height: map.height / view.tiles.groups };
    const left = map.left + j * cell.width, top = map.top + i * cell.height;
    if (this.root.classList.contains("narrow")) {
      box.style.left = "8px";
      box.style.top = `${top > innerHeight / 2 ? Math.max(8, top - height - 24) : top + cell.height + 24}px`;
      return;
    }
    const right = left + cell.width + 12;
    box.style.left = `${right + width < innerWidth ? right : Math.max(8, left - width - 12)}px`;
    box.style.top = `${Math.max(8, top - height - 4)}px`;
  }
}

function niceStep(least) {
  const power = 2 ** Math.ceil(Math.log2(Math.max(1, least)));
  return Math.max(64, power);
}

const views = new WeakMap();

export default function (component) {
  const root = component.parentElement.querySelector(".tile-map");
  if (!views.has(root)) views.set(root, new TileMapView(root));
  const view = views.get(root);
  view.update(component.data, component.setTriggerValue);
  return () => {
    view.destroy();
    views.delete(root);
  };
}
