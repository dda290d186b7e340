// What is known about every tile.  The one thing decided here is `gap < ln λ`; all other numbers
// and all sentences come from Python.

const MASKED = 0, COMPUTED = 1, SKIPPED = 2;
const STATE = ["masked", "computed", "skipped"];
const SKIPPED_BY_HAND = -1e29; // gaps below it hold for every λ, also where nothing is skipped

/** Base64 → typed array. */
function decode(text, Type) {
  if (!text) return null;
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let n = 0; n < bytes.length; n++) bytes[n] = binary.charCodeAt(n);
  return new Type(bytes.buffer);
}

/** Gap map of Python → typed arrays; the JSON's own fields stay as they are. */
function decodeTiles(tiles) {
  return {
    ...tiles,
    gap: decode(tiles.gap, Float32Array),
    tileMax: decode(tiles.tile_max, Float32Array),
    row: decode(tiles.deciding_row, Int32Array),
    mass: decode(tiles.mass, Float32Array),
    byHand: new Set((tiles.forced ?? []).map(([i, j]) => i * tiles.key_tiles + j)),
  };
}

/** State of tile n of a gap map; `ln` is ln λ, null where nothing is skipped. */
function stateOf(tiles, n, ln) {
  const gap = tiles.gap[n];
  if (gap === -Infinity) return MASKED;
  return gap < SKIPPED_BY_HAND || (ln !== null && gap < ln) ? SKIPPED : COMPUTED;
}

function number(x) {
  if (x === Infinity) return "+∞";
  if (x === -Infinity) return "−∞";
  return x.toFixed(2).replace("-", "−");
}

/** Why a tile is in its state, in words. */
function reason(tiles, n, ln) {
  const state = stateOf(tiles, n, ln);
  if (tiles.byHand.has(n)) return "forced by hand";
  if (state === MASKED) return "no query of this group sees a key of it";
  if (tiles.gap[n] === Infinity) return "first visited, never skipped";
  const gap = `gap ${number(tiles.gap[n])}`;
  if (ln === null) return `${gap}, nothing is skipped`;
  return `${gap} ${state === SKIPPED ? "<" : "≥"} ln λ ${number(ln)}`;
}

/** Tokens first … stop−1 as one line of text. */
function words(tokens, first, stop) {
  if (!tokens) return "";
  return tokens.slice(first, stop).join("").replace(/\s+/g, " ").trim();
}
