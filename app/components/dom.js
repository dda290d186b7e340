// Small helpers for the browser's page that more than one component needs.

function make(tag, className, parent) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (parent) parent.append(node);
  return node;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** "a **b** c" → text with <strong>; only ever our own sentences, and as text nodes. */
function setSentence(node, sentence) {
  node.replaceChildren(...sentence.split("**").map((part, n) => {
    if (n % 2 === 0) return document.createTextNode(part);
    const strong = document.createElement("strong");
    strong.textContent = part;
    return strong;
  }));
}

/** Relative luminance of a CSS colour, 0 … 1. */
function luminance(colour) {
  const context = document.createElement("canvas").getContext("2d");
  context.fillStyle = colour.trim() || "#fff";
  context.fillRect(0, 0, 1, 1);
  const [r, g, b] = context.getImageData(0, 0, 1, 1).data;
  return (0.2126 * r + 0.7152 * g + 0.0722 * b) / 255;
}

/** Whether Streamlit's theme is dark where `root` stands. */
function isDark(root) {
  return luminance(getComputedStyle(root).getPropertyValue("--st-background-color")) < 0.5;
}
