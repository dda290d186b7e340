// Canvas painting: tiles, cursor, bars of one query row, thumbnails.

const COLOURS = { computed: [0, 114, 178], skipped: [230, 159, 0] };
const HATCH_FROM = 4; // CSS pixels: smaller cells have no room for a hatch

const css = (rgb) => `rgb(${rgb.join(",")})`;

function palette(dark) {
  return [dark ? [38, 42, 51] : [238, 238, 238], COLOURS.computed, COLOURS.skipped];
}

/** Diagonal strokes, so that "skipped" never rests on colour alone. */
function hatch(context, ratio) {
  const size = Math.max(4, Math.round(5 * ratio));
  const stamp = document.createElement("canvas");
  stamp.width = stamp.height = size;
  const pen = stamp.getContext("2d");
  pen.strokeStyle = "rgba(0, 0, 0, 0.55)";
  pen.lineWidth = Math.max(1, ratio);
  for (const shift of [-size, 0, size]) {
    pen.beginPath();
    pen.moveTo(shift, size);
    pen.lineTo(shift + size, 0);
    pen.stroke();
  }
  return context.createPattern(stamp, "repeat");
}

/** One pixel per tile. */
function pixels(tiles, ln, colours) {
  const small = document.createElement("canvas");
  small.width = tiles.key_tiles;
  small.height = tiles.groups;
  const context = small.getContext("2d");
  const image = context.createImageData(small.width, small.height);
  const packed = colours.map(([r, g, b]) => (255 << 24) | (b << 16) | (g << 8) | r); // little-endian
  const out = new Int32Array(image.data.buffer);
  for (let n = 0; n < out.length; n++) out[n] = packed[stateOf(tiles, n, ln)];
  context.putImageData(image, 0, 0);
  return small;
}

/** Cell size in device pixels and canvas size in CSS pixels, for a map `width` CSS pixels wide. */
function measure(tiles, width, ratio) {
  const cellWidth = Math.max(1, Math.floor((width * ratio) / tiles.key_tiles));
  const cssWidth = Math.min(width, (cellWidth * tiles.key_tiles) / ratio);
  const wanted = cssWidth * tiles.aspect * ratio;
  const cellHeight = Math.max(1, Math.round(wanted / tiles.groups));
  const fits = cellHeight * tiles.groups <= 1.3 * wanted;
  const cssHeight = fits ? (cellHeight * tiles.groups) / ratio : wanted / ratio;
  return { cellWidth, cellHeight, cssWidth, cssHeight, ratio };
}

function sizeCanvas(canvas, width, height, cssWidth, cssHeight) {
  if (canvas.width !== width) canvas.width = width;
  if (canvas.height !== height) canvas.height = height;
  canvas.style.width = `${cssWidth}px`;
  canvas.style.height = `${cssHeight}px`;
}

function paintMap(canvas, tiles, size, ln, dark) {
  const { cellWidth: w, cellHeight: h, ratio } = size;
  sizeCanvas(canvas, w * tiles.key_tiles, h * tiles.groups, size.cssWidth, size.cssHeight);
  const context = canvas.getContext("2d");
  const colours = palette(dark);
  if (Math.min(w, h) < HATCH_FROM * ratio) {
    context.imageSmoothingEnabled = false;
    context.drawImage(pixels(tiles, ln, colours), 0, 0, canvas.width, canvas.height);
    return;
  }
  context.fillStyle = css(colours[MASKED]);
  context.fillRect(0, 0, canvas.width, canvas.height);
  const strokes = hatch(context, ratio);
  const line = Math.round(ratio); // of the masked colour, between cells
  for (let n = 0; n < tiles.gap.length; n++) {
    const state = stateOf(tiles, n, ln);
    if (state === MASKED) continue;
    const x = (n % tiles.key_tiles) * w, y = Math.floor(n / tiles.key_tiles) * h;
    context.fillStyle = css(colours[state]);
    context.fillRect(x, y, w - line, h - line);
    if (state === SKIPPED) {
      context.fillStyle = strokes;
      context.fillRect(x, y, w - line, h - line);
    }
  }
}

/** Selected tile and cursor: outlines of two tones, visible on every state's colour. */
function paintOverlay(canvas, tiles, size, cursor, selected) {
  const { cellWidth: w, cellHeight: h, ratio } = size;
  sizeCanvas(canvas, w * tiles.key_tiles, h * tiles.groups, size.cssWidth, size.cssHeight);
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  const shrink = canvas.width / (size.cssWidth * ratio); // > 1 where tiles are below a pixel
  const outline = ({ i, j }, outer, inner) => {
    const pad = 2 * ratio * shrink;
    const box = [j * w - pad / 2, i * h - pad / 2, w + pad, h + pad];
    context.lineWidth = 4 * ratio * shrink;
    context.strokeStyle = outer;
    context.strokeRect(...box);
    context.lineWidth = 2 * ratio * shrink;
    context.strokeStyle = inner;
    context.strokeRect(...box);
  };
  if (cursor) {
    context.fillStyle = "rgba(128, 128, 128, 0.2)";
    context.fillRect(0, cursor.i * h, canvas.width, h);
    context.fillRect(cursor.j * w, 0, w, canvas.height);
  }
  for (const n of tiles.byHand) {
    outline({ i: Math.floor(n / tiles.key_tiles), j: n % tiles.key_tiles }, "#000", "#fff");
  }
  if (selected) outline(selected, "#fff", "#d55e00");
  if (cursor) outline(cursor, "#fff", "#000");
}

const FLOOR = 1e-6; // weights below it get no bar

/** Attention weight of one query row in every key tile, under the map's columns. */
function paintBars(canvas, tiles, size, ln, dark, ink) {
  const { cellWidth: w, ratio } = size;
  const height = Math.round(88 * ratio);
  sizeCanvas(canvas, w * tiles.key_tiles, height, size.cssWidth, height / ratio);
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, height);
  context.fillStyle = ink;
  context.globalAlpha = 0.18;
  for (let power = 0; power <= 6; power += 2) {
    context.fillRect(0, Math.min((power / 6) * height, height - 1), canvas.width, Math.max(1, Math.round(ratio)));
  }
  context.globalAlpha = 1;
  const colours = palette(dark);
  const strokes = hatch(context, ratio);
  const line = w >= 3 * ratio ? Math.round(ratio) : 0;
  for (let j = 0; j < tiles.key_tiles; j++) {
    if (!(tiles.mass[j] > FLOOR)) continue;
    const state = stateOf(tiles, tiles.row_group * tiles.key_tiles + j, ln);
    const bar = Math.max(2 * ratio, (1 - Math.log10(tiles.mass[j]) / Math.log10(FLOOR)) * height);
    context.fillStyle = css(colours[state]);
    context.fillRect(j * w, height - bar, w - line, bar);
    if (state === SKIPPED) {
      context.fillStyle = strokes;
      context.fillRect(j * w, height - bar, w - line, bar);
    }
  }
}

function paintThumbnail(canvas, tiles, ln, dark) {
  const image = pixels(tiles, ln, palette(dark));
  if (canvas.width !== image.width) canvas.width = image.width;
  if (canvas.height !== image.height) canvas.height = image.height;
  canvas.style.height = `${Math.round(72 * Math.min(1.5, Math.max(0.25, tiles.aspect)))}px`;
  canvas.getContext("2d").drawImage(image, 0, 0);
}
