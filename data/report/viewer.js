// The slices of one scan: unpacks the voxels of the page and shows three planes. Arrays are (z, y, x), z to the head.
"use strict";

const AXIAL = 0, CORONAL = 1, SAGITTAL = 2;
const NAMES = ["axial", "coronal", "sagittal"];
// Axis of the rows and of the columns of each plane; the head is up, so z runs against the rows.
const ROWS = [1, 0, 0], COLUMNS = [2, 2, 1];
const WHEEL_STEP = 40; // pixels that the wheel scrolls for one slice
const TAP_PIXELS = 10; // that a finger may move while it taps
const PIXELS_PER_MM = 2;
const MOST_PIXELS = 1200;
const CONTOUR = "#ff9f1c", ANNOTATED = "#35d0ff", CHOSEN = "#ffe14d", CROSS = "rgba(120, 220, 255, 0.6)";

const byId = (id) => document.getElementById(id);

/** Bytes of a base64 text. */
function bytesOf(id) {
  const text = byId(id).textContent.trim();
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

/** Bytes that were packed with gzip. */
async function unpack(id) {
  const stream = new Blob([bytesOf(id)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Adds to each voxel the mean of its left and its upper neighbour, which were taken away, slice by slice. */
function restore(voxels, [depth, height, width]) {
  for (let z = 0, i = 0; z < depth; z++) {
    for (let y = 0; y < height; y++) {
      let left = 0;
      for (let x = 0; x < width; x++, i++) {
        left = voxels[i] = voxels[i] + ((left + (y ? voxels[i - width] : 0)) >> 1);
        left &= 255;
      }
    }
  }
  return voxels;
}

/** Numbers of the nodules in each voxel, of (start, length, number) triples. */
function labelsOf(runs, size) {
  const labels = new Uint16Array(size);
  for (let i = 0; i < runs.length; i += 3) labels.fill(runs[i + 2], runs[i], runs[i] + runs[i + 1]);
  return labels;
}

class Viewer {
  constructor(scan, voxels) {
    this.scan = scan;
    this.shape = scan.shape;
    this.voxels = voxels;
    this.labels = labelsOf(scan.runs, voxels.length);
    this.truth = scan.truth.length ? labelsOf(scan.truth, voxels.length) : null;
    this.position = this.shape.map((size) => size >> 1);
    this.chosen = 0;
    this.zoom = 1;
    this.scrolled = 0;
    this.waiting = 0;
    this.grey = new Uint8Array(256);
    this.planes = NAMES.map((name, axis) => this.planeOf(name, axis));
    this.listen();
    this.setWindow();
  }

  planeOf(name, axis) {
    const canvas = byId(name), slider = byId(`${name}-slice`);
    const [rows, columns] = [ROWS[axis], COLUMNS[axis]].map((other) => this.shape[other]);
    const [tall, wide] = [ROWS[axis], COLUMNS[axis]].map((other) => this.shape[other] * this.scan.spacing[other]);
    const scale = Math.min(PIXELS_PER_MM, MOST_PIXELS / Math.max(tall, wide));
    canvas.width = Math.round(wide * scale);
    canvas.height = Math.round(tall * scale);
    slider.max = this.shape[axis] - 1;
    const slice = new OffscreenCanvas(columns, rows);
    return { axis, name, canvas, slider, rows, columns, slice, pixels: new ImageData(columns, rows) };
  }

  listen() {
    for (const plane of this.planes) {
      const { axis, canvas, slider } = plane;
      slider.addEventListener("input", () => this.go(axis, +slider.value));
      canvas.addEventListener("wheel", (event) => this.onWheel(event, axis), { passive: false });
      canvas.addEventListener("keydown", (event) => this.onKey(event, axis));
      canvas.addEventListener("pointerdown", (event) => this.onDown(event, plane));
      canvas.addEventListener("pointermove", (event) => {
        if (this.held && event.pointerType !== "touch") this.point(event, plane);
        this.tellValue(event, plane);
      });
      canvas.addEventListener("pointerup", (event) => this.onUp(event, plane));
      canvas.addEventListener("pointercancel", () => this.release());
      canvas.addEventListener("pointerleave", () => (byId("value").textContent = ""));
    }
    for (const button of document.querySelectorAll("[name=window]")) {
      button.addEventListener("change", () => this.setWindow());
    }
    byId("viewer").addEventListener("keydown", (event) => this.onLetter(event));
    byId("contours").addEventListener("change", () => this.draw());
    byId("zoom").addEventListener("input", () => this.setZoom(+byId("zoom").value));
    byId("next").addEventListener("click", () => this.step(1));
    byId("previous").addEventListener("click", () => this.step(-1));
    for (const link of document.querySelectorAll("[data-nodule], [data-mark]")) {
      link.addEventListener("click", (event) => {
        event.preventDefault();
        if (link.dataset.nodule) this.choose(+link.dataset.nodule);
        else this.goTo(this.scan.marks[+link.dataset.mark - 1]);
        byId("axial").focus({ preventScroll: true });
        byId("viewer").scrollIntoView({ block: "start" });
      });
    }
  }

  /** A mouse moves the other planes from now on, in a view that stays where it is; a finger may scroll the page. */
  onDown(event, plane) {
    plane.canvas.focus({ preventScroll: true });
    this.held = this.planes.map((each) => this.viewOf(each));
    this.down = [event.clientX, event.clientY];
    if (event.pointerType === "touch") return;
    plane.canvas.setPointerCapture(event.pointerId);
    this.point(event, plane);
  }

  onUp(event, plane) {
    const [x, y] = this.down || [Infinity, Infinity];
    const isTap = Math.hypot(event.clientX - x, event.clientY - y) < TAP_PIXELS;
    if (event.pointerType === "touch" && isTap) this.point(event, plane);
    this.release();
  }

  release() {
    this.held = this.down = null;
    this.draw();
  }

  onWheel(event, axis) {
    if (event.ctrlKey) return; // the browser's own zoom
    const down = axis === AXIAL ? -1 : 1, next = this.position[axis] + down * Math.sign(event.deltaY);
    if (next < 0 || next >= this.shape[axis]) return; // the page scrolls on
    event.preventDefault();
    this.scrolled += event.deltaY * [1, 16, 400][event.deltaMode];
    const slices = Math.trunc(this.scrolled / WHEEL_STEP);
    this.scrolled -= slices * WHEEL_STEP;
    // Down is to the feet, to the back, and to the patient's left.
    if (slices) this.go(axis, this.position[axis] + (axis === AXIAL ? -slices : slices));
  }

  onKey(event, axis) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const up = axis === AXIAL ? 1 : -1;
    const steps = { ArrowUp: up, ArrowDown: -up, PageUp: 10 * up, PageDown: -10 * up };
    const last = this.shape[axis] - 1;
    if (event.key in steps) this.go(axis, this.position[axis] + steps[event.key]);
    else if (event.key === "Home") this.go(axis, up > 0 ? last : 0);
    else if (event.key === "End") this.go(axis, up > 0 ? 0 : last);
    else return;
    event.preventDefault();
  }

  /** Keys that do the same wherever the focus is in the viewer. */
  onLetter(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === "n") this.step(1);
    else if (event.key === "p") this.step(-1);
    else if (event.key === "c") byId("contours").click();
    else if (event.key === "l" || event.key === "s") byId(event.key === "l" ? "lung" : "soft").click();
    else if (event.key === "+" || event.key === "-") this.setZoom(this.zoom + (event.key === "+" ? 1 : -1));
    else return;
    event.preventDefault();
  }

  go(axis, slice) {
    this.position[axis] = Math.min(Math.max(slice, 0), this.shape[axis] - 1);
    this.tell();
    this.draw();
  }

  choose(number) {
    this.chosen = number;
    this.goTo(this.scan.nodules[number - 1].index);
  }

  goTo(index) {
    this.position = index.map((value, axis) => Math.min(Math.max(Math.round(value), 0), this.shape[axis] - 1));
    this.tell();
    this.draw();
  }

  step(by) {
    const count = this.scan.nodules.length;
    if (count) this.choose(this.chosen ? ((this.chosen - 1 + by + count) % count) + 1 : by > 0 ? 1 : count);
  }

  setZoom(zoom) {
    this.zoom = Math.min(Math.max(zoom, 1), +byId("zoom").max);
    byId("zoom").value = this.zoom;
    this.draw();
  }

  setWindow() {
    const { level, width } = document.querySelector("[name=window]:checked").dataset;
    this.grey = Uint8Array.from(this.scan.hu, (hu) => Math.min(Math.max(((hu - level) / width + 0.5) * 255, 0), 255));
    this.draw();
  }

  /** What the status line says, when the movement has ended: a screen reader reads it. */
  tell() {
    clearTimeout(this.waiting);
    this.waiting = setTimeout(() => {
      const { position, shape, scan } = this;
      const world = scan.origin.map((start, i) => (start + position[2 - i] * scan.spacing[2 - i]).toFixed(1));
      const number = this.labelAt(...position);
      const there = number ? `; nodule ${number}` : "";
      byId("status").textContent =
        `axial slice ${shape[0] - position[0]} of ${shape[0]}, at (${world.join(", ")}) mm${there}`;
    }, 150);
  }

  labelAt(z, y, x) {
    return this.labels[(z * this.shape[1] + y) * this.shape[2] + x];
  }

  /** The part of a plane that is seen: first column and row, columns and rows, in voxels. */
  viewOf({ axis, columns, rows }) {
    if (this.held) return this.held[axis];
    const [width, height] = [columns / this.zoom, rows / this.zoom];
    const column = this.position[COLUMNS[axis]] + 0.5;
    const row = (axis === AXIAL ? this.position[1] : rows - 1 - this.position[0]) + 0.5;
    const left = Math.min(Math.max(column - width / 2, 0), columns - width);
    const top = Math.min(Math.max(row - height / 2, 0), rows - height);
    return { left, top, width, height };
  }

  /** The voxel under the pointer. */
  voxelAt(event, plane) {
    const box = plane.canvas.getBoundingClientRect(), view = this.viewOf(plane);
    const column = Math.floor(view.left + ((event.clientX - box.left) / box.width) * view.width);
    const row = Math.floor(view.top + ((event.clientY - box.top) / box.height) * view.height);
    const voxel = [...this.position];
    voxel[COLUMNS[plane.axis]] = Math.min(Math.max(column, 0), plane.columns - 1);
    const there = Math.min(Math.max(row, 0), plane.rows - 1);
    voxel[ROWS[plane.axis]] = plane.axis === AXIAL ? there : plane.rows - 1 - there;
    return voxel;
  }

  point(event, plane) {
    this.position = this.voxelAt(event, plane);
    this.chosen = this.labelAt(...this.position) || this.chosen;
    this.tell();
    this.draw();
  }

  tellValue(event, plane) {
    const [z, y, x] = this.voxelAt(event, plane);
    const hu = this.scan.hu[this.voxels[(z * this.shape[1] + y) * this.shape[2] + x]];
    byId("value").textContent = `${hu} HU`;
  }

  draw() {
    if (this.asked) return;
    this.asked = requestAnimationFrame(() => {
      this.asked = 0;
      for (const plane of this.planes) this.drawPlane(plane);
    });
  }

  drawPlane(plane) {
    const { axis, canvas, slider, rows, columns, slice, pixels } = plane;
    const [, height, width] = this.shape, data = pixels.data;
    const labels = new Uint16Array(rows * columns), truth = this.truth && new Uint16Array(rows * columns);
    for (let row = 0, i = 0; row < rows; row++) {
      const z = axis === AXIAL ? this.position[0] : rows - 1 - row;
      const y = axis === AXIAL ? row : this.position[1];
      let from = (z * height + (axis === SAGITTAL ? 0 : y)) * width + (axis === SAGITTAL ? this.position[2] : 0);
      const step = axis === SAGITTAL ? width : 1;
      for (let column = 0; column < columns; column++, i++, from += step) {
        const grey = this.grey[this.voxels[from]];
        data[4 * i] = data[4 * i + 1] = data[4 * i + 2] = grey;
        data[4 * i + 3] = 255;
        labels[i] = this.labels[from];
        if (truth) truth[i] = this.truth[from];
      }
    }
    slice.getContext("2d").putImageData(pixels, 0, 0);
    const context = canvas.getContext("2d"), view = this.viewOf(plane);
    context.imageSmoothingQuality = "high";
    context.drawImage(slice, view.left, view.top, view.width, view.height, 0, 0, canvas.width, canvas.height);
    const place = (column, row) =>
      [((column - view.left) / view.width) * canvas.width, ((row - view.top) / view.height) * canvas.height];
    this.drawCross(context, plane, place);
    this.drawScale(context, plane, view);
    if (byId("contours").checked) {
      if (truth) this.drawContours(context, truth, plane, place, ANNOTATED);
      this.drawContours(context, labels, plane, place);
    }
    slider.value = this.position[axis];
    const count = this.shape[axis], number = axis === AXIAL ? count - this.position[0] : this.position[axis] + 1;
    byId(`${plane.name}-number`).textContent = `${number} of ${count}`;
    slider.setAttribute("aria-valuetext", `slice ${number} of ${count}`);
  }

  /** A bar of 50 mm, or of 10 mm where that is too long. */
  drawScale(context, { axis, canvas }, view) {
    const perMm = canvas.width / (view.width * this.scan.spacing[COLUMNS[axis]]);
    const length = 50 * perMm < 0.4 * canvas.width ? 50 : 10, y = canvas.height - 10;
    for (const [color, width] of [["#000", 5], ["#fff", 2.5]]) {
      context.strokeStyle = color;
      context.lineWidth = width;
      context.beginPath();
      context.moveTo(10, y);
      context.lineTo(10 + length * perMm, y);
      context.stroke();
    }
    context.font = `${Math.max(12, canvas.width / 40)}px system-ui, sans-serif`;
    context.lineWidth = 3;
    context.strokeStyle = "#000";
    context.fillStyle = "#fff";
    context.strokeText(`${length} mm`, 10, y - 7);
    context.fillText(`${length} mm`, 10, y - 7);
  }

  drawCross(context, { axis, canvas, rows }, place) {
    const row = axis === AXIAL ? this.position[1] : rows - 1 - this.position[0];
    const [x, y] = place(this.position[COLUMNS[axis]] + 0.5, row + 0.5), gap = 0.06 * canvas.width;
    context.strokeStyle = CROSS;
    context.lineWidth = 1;
    context.beginPath();
    for (const [x1, y1, x2, y2] of [[0, y, x - gap, y], [x + gap, y, canvas.width, y],
      [x, 0, x, y - gap], [x, y + gap, x, canvas.height]]) {
      context.moveTo(x1, y1);
      context.lineTo(x2, y2);
    }
    context.stroke();
  }

  /** Outlines of all labels of a slice, numbered where no color is given. */
  drawContours(context, labels, { canvas, rows, columns }, place, color) {
    const paths = new Map(), corners = new Map();
    const edge = (number, c1, r1, c2, r2) => {
      if (!number) return;
      if (!paths.has(number)) paths.set(number, new Path2D()), corners.set(number, [c1, r1]);
      const path = paths.get(number), corner = corners.get(number);
      path.moveTo(...place(c1, r1));
      path.lineTo(...place(c2, r2));
      corner[0] = Math.max(corner[0], c2);
      corner[1] = Math.min(corner[1], r1);
    };
    for (let row = 0, i = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++, i++) {
        const here = labels[i], left = column ? labels[i - 1] : 0, above = row ? labels[i - columns] : 0;
        if (here !== left) for (const number of [here, left]) edge(number, column, row, column, row + 1);
        if (here !== above) for (const number of [here, above]) edge(number, column, row, column + 1, row);
        if (here && column === columns - 1) edge(here, columns, row, columns, row + 1);
        if (here && row === rows - 1) edge(here, column, rows, column + 1, rows);
      }
    }
    const size = Math.max(14, canvas.width / 36);
    context.font = `bold ${size}px system-ui, sans-serif`;
    for (const [number, path] of paths) {
      context.strokeStyle = context.fillStyle = color || (number === this.chosen ? CHOSEN : CONTOUR);
      context.lineWidth = !color && number === this.chosen ? 2.5 : 1.5;
      context.stroke(path);
      if (color) continue;
      const [x, y] = place(...corners.get(number));
      context.fillText(number, Math.min(x + 4, canvas.width - 2 * size), Math.max(y - 2, size));
    }
  }
}

async function start() {
  byId("no-viewer").textContent = "The slices are being unpacked.";
  await new Promise((done) => setTimeout(done)); // shows it
  const scan = JSON.parse(byId("scan").textContent), viewer = byId("viewer");
  if (typeof DecompressionStream === "undefined" || typeof OffscreenCanvas === "undefined") {
    byId("no-viewer").textContent = "This browser is too old to show the slices; the pictures of the nodules are below.";
    return;
  }
  const shown = new Viewer(scan, restore(await unpack("voxels"), scan.shape));
  viewer.hidden = false;
  byId("no-viewer").hidden = true;
  if (scan.nodules.length) shown.choose(1);
  else shown.tell();
  window.viewer = shown;
  document.documentElement.dataset.ready = "yes";
}

start().catch((error) => {
  byId("no-viewer").textContent = `The slices cannot be shown (${error.message}); the pictures of the nodules are below.`;
});
