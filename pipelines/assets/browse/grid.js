// A grid that scrolls through a million images: only the tiles in sight exist.

const GAP = 8, SIDE = 196, WORDS = 43, AHEAD = 2;
const MOST_PX = 12_000_000;  // browsers stop at 16 to 33 million; beyond, a pixel is several rows

export class Grid {
  constructor(scroll, sheet, { fetchRows, open, choose, isChosen, colour }) {
    Object.assign(this, { scroll, sheet, fetchRows, open, choose, isChosen, colour });
    this.total = 0;
    this.rows = new Map();
    this.tiles = new Map();
    this.waiting = new Set();
    this.generation = 0;
    scroll.addEventListener("scroll", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(scroll);
  }

  reset(total, first) {
    this.generation += 1;
    this.total = total;
    this.rows = new Map(first.map((row, at) => [at, row]));
    this.waiting.clear();
    for (const tile of this.tiles.values()) tile.remove();
    this.tiles.clear();
    this.scroll.scrollTop = 0;
    this.draw();
  }

  measure() {
    const columns = Math.max(1, Math.floor((this.scroll.clientWidth - GAP) / (SIDE + GAP)));
    const lines = Math.ceil(this.total / columns), step = SIDE + WORDS + GAP;
    const height = Math.min(lines * step + GAP, MOST_PX);
    const inSight = Math.ceil(this.scroll.clientHeight / step);
    return { columns, lines, step, height, inSight };
  }

  // The line at the top, and where it lies: exact for what fits, proportional beyond that.
  top({ lines, step, height }) {
    const far = lines * step + GAP > MOST_PX;
    if (!far) return { line: Math.floor(this.scroll.scrollTop / step), at: null };
    const reach = Math.max(1, height - this.scroll.clientHeight);
    const line = Math.round((this.scroll.scrollTop / reach) * Math.max(0, lines - 1));
    return { line, at: this.scroll.scrollTop };
  }

  draw() {
    const size = this.measure(), { line, at } = this.top(size);
    this.sheet.style.height = `${size.height}px`;
    const from = Math.max(0, line - AHEAD) * size.columns;
    const to = Math.min(this.total, (line + size.inSight + 1 + AHEAD) * size.columns);
    for (const [number, tile] of this.tiles)
      if (number < from || number >= to) { tile.remove(); this.tiles.delete(number); }
    for (let number = from; number < to; number++) {
      const row = this.rows.get(number);
      if (!row) { this.load(number); continue; }
      let tile = this.tiles.get(number);
      if (!tile) {
        tile = this.make(row, number);
        this.tiles.set(number, tile);
        this.sheet.append(tile);
      }
      const down = Math.floor(number / size.columns);
      const y = at === null ? GAP + down * size.step : at + GAP + (down - line) * size.step;
      tile.style.left = `${GAP + (number % size.columns) * (SIDE + GAP)}px`;
      tile.style.top = `${y}px`;
    }
  }

  async load(number) {
    const page = Math.floor(number / 120);
    if (this.waiting.has(page)) return;
    this.waiting.add(page);
    const generation = this.generation;
    const rows = await this.fetchRows(page * 120, 120);
    if (generation !== this.generation || !rows) return;
    if (this.rows.size > 6000) { this.rows.clear(); this.waiting = new Set([page]); }
    rows.forEach((row, at) => this.rows.set(page * 120 + at, row));
    this.draw();
  }

  make(row, number) {
    const tile = element("div", "tile");
    tile.style.width = `${SIDE}px`;
    tile.style.height = `${SIDE + WORDS}px`;
    tile.tabIndex = 0;
    tile.dataset.n = row.n;
    tile.classList.toggle("chosen", this.isChosen(row.n));
    const box = element("input");
    box.type = "checkbox";
    box.checked = this.isChosen(row.n);
    box.setAttribute("aria-label", `select ${row.image_id}`);
    box.addEventListener("click", event => event.stopPropagation());
    box.addEventListener("change", () => {
      this.choose(row.n, box.checked);
      tile.classList.toggle("chosen", box.checked);
    });
    const picture = element("div", "picture");
    if (row.status === "ok") this.picture(picture, row);
    else picture.append(element("div", "problem", `${row.status}: ${row.error ?? ""}`));
    const words = element("div", "words");
    words.append(element("div", "", row.image_id));
    const scores = row.drawn.map(box => box.score).filter(score => score !== null);
    const best = scores.length ? `, best ${Math.max(...scores).toFixed(2)}` : "";
    const many = row.drawn.length === 1 ? "1 box" : `${row.drawn.length} boxes`;
    words.append(element("div", "small", row.warning ?? `${many}${best}`));
    tile.title = row.image_id;
    tile.append(box, picture, words);
    tile.addEventListener("click", () => this.open(number));
    tile.addEventListener("keydown", event => { if (event.key === "Enter") this.open(number); });
    return tile;
  }

  picture(place, row) {
    const scale = Math.min(SIDE / row.width, SIDE / row.height, 4);
    const width = row.width * scale, height = row.height * scale;
    const image = element("img"), canvas = element("canvas");
    image.alt = "";
    image.loading = "lazy";
    for (const one of [image, canvas]) {
      one.style.left = `${(SIDE - width) / 2}px`;
      one.style.top = `${(SIDE - height) / 2}px`;
      one.style.width = `${width}px`;
      one.style.height = `${height}px`;
    }
    image.addEventListener("error", async () => {
      const told = await fetch(image.src).then(reply => reply.json()).catch(() => ({}));
      place.replaceChildren(element("div", "problem", told.error ?? "no picture"));
    });
    image.src = `/thumb/${row.n}.jpg`;
    drawBoxes(canvas, row.drawn, width, height, scale, this.colour);
    place.append(image, canvas);
  }

  refresh() {
    for (const tile of this.tiles.values()) {
      const chosen = this.isChosen(Number(tile.dataset.n));
      tile.classList.toggle("chosen", chosen);
      tile.querySelector("input").checked = chosen;
    }
  }
}

export function element(name, kind = "", text = "") {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  if (text) made.textContent = text;  // names are text, whatever they look like
  return made;
}

export function drawBoxes(canvas, boxes, width, height, scale, colour, words = false) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(width * ratio));
  canvas.height = Math.max(1, Math.round(height * ratio));
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  for (const box of boxes) {
    const [x, y] = [box.x1 * scale, box.y1 * scale];
    pen.setLineDash(box.decision === "ignored" ? [4, 3] : []);
    pen.lineWidth = box.score === null || box.score >= 0.5 ? 2 : 1;
    pen.strokeStyle = colour(box.class);
    pen.strokeRect(x, y, (box.x2 - box.x1) * scale, (box.y2 - box.y1) * scale);
    if (!words) continue;
    const text = box.score === null ? box.class : `${box.class} ${box.score.toFixed(2)}`;
    pen.font = "12px system-ui, sans-serif";
    const wide = pen.measureText(text).width + 6, above = y > 16 ? y - 16 : y;
    pen.fillStyle = colour(box.class);
    pen.fillRect(x, above, wide, 16);
    pen.fillStyle = "#fff";
    pen.fillText(text, x + 3, above + 12);
  }
}
