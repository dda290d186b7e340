// The λ slider: it moves at once in the browser, and is sent when it has come to rest.
//
// Python sends a table with one entry for every position of the slider; position `data.steps` (the
// last entry) is the exact λ that Python holds.

class ThresholdSlider {
  /** `follow` is called, at most once a frame, when λ has moved under the user's hand. */
  constructor(root, follow) {
    this.input = root.querySelector(".threshold input");
    this.output = root.querySelector(".threshold output");
    this.scale = root.querySelector(".scale");
    this.follow = follow;
    this.moved = false; // λ is where the user has put it, and has not been sent
    this.pending = null; // λ that was sent and has not come back
    this.input.oninput = () => this.slide();
    this.input.onchange = () => this.commitSoon();
    this.input.onpointerup = this.input.onblur = () => { if (this.moved) this.commitSoon(); };
  }

  destroy() {
    for (const timer of [this.timer, this.giveUp]) clearTimeout(timer);
  }

  update(data, trigger) {
    this.data = data;
    this.trigger = trigger;
    if (this.pending !== null && same(this.pending, data.threshold)) this.pending = null;
    if (!this.moved && this.pending === null) this.adopt();
    const last = data.steps - 1;
    this.scale.replaceChildren(...data.ticks.map(([position, text]) => {
      const tick = make("span");
      const share = position / last; // a thumb of 24 px travels its own width less than the track
      tick.style.left = `calc(${12 - 24 * share}px + ${100 * share}%)`;
      tick.textContent = text;
      return tick;
    }));
  }

  /** ln λ; null where nothing is skipped. */
  get ln() {
    return this.data.ln[this.step];
  }

  /** λ moved under the user's hand: everything follows, nothing is sent. */
  slide() {
    this.step = Number(this.input.value);
    this.moved = true;
    clearTimeout(this.timer);
    if (!this.frame) {
      this.frame = requestAnimationFrame(() => { this.frame = null; this.follow(); });
    }
  }

  commitSoon() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      const threshold = this.data.thresholds[this.step];
      this.moved = false;
      if (same(threshold, this.data.threshold)) return; // dragged back to where it was
      this.pending = threshold;
      this.trigger("threshold", threshold);
      clearTimeout(this.giveUp);
      this.giveUp = setTimeout(() => { this.pending = null; this.adopt(); this.follow(); }, 10_000);
    }, 250); // so that a held arrow key is one commit
  }

  /** Take λ from Python. */
  adopt() {
    clearTimeout(this.giveUp);
    this.step = this.data.steps;
    this.input.max = this.data.steps - 1;
    this.input.value = this.data.nearest;
  }

  paint() {
    this.output.textContent = this.data.labels[this.step];
    this.input.setAttribute("aria-valuetext", this.data.labels[this.step]);
  }
}

/** Whether two λ are the same but for rounding: a scale factor is kept with four digits. */
function same(a, b) {
  return Math.abs(a - b) <= 2e-3 * a;
}
