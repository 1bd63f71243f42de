/** Pieces of the page, and pictures on it. These functions know nothing of the model. */

/** Write a number with a minus sign that is as wide as a plus, and none before a zero. */
const numbered = (value, digits) =>
  value.toFixed(digits).replace(/^-(?=[0.]*[1-9])/, "−").replace("-", "");
const written = (value) => (value < -1e8 ? "masked" : numbered(value, 3));
const percent = (share) => `${(100 * share).toFixed(1)}%`;
const signed = (value, digits) => numbered(value, digits).replace(/^(?=[0.]*[1-9])/, "+");
const points = (change) => signed(100 * change, 1);
const strongest = (values) => values.reduce((best, x, i) => (x > values[best] ? i : best), 0);

function add(parent, name, text = "", properties = {}) {
  const element = Object.assign(document.createElement(name), properties);
  element.textContent = text;
  parent.append(element);
  return element;
}

/** Give a choice these options, pairs of a value and a text, and keep what was chosen. */
function fill(select, options) {
  const { value } = select;
  select.replaceChildren();
  for (const [each, text] of options) add(select, "option", text, { value: each });
  if (options.some(([each]) => String(each) === value)) select.value = value;
}

/** Add a line of a table: its name, then numbers. */
function addLine(table, name, values) {
  const line = add(table, "tr");
  add(line, "th", name, { scope: "row" });
  for (const value of values) add(line, "td", value);
  return line;
}

function colorsOf(heat) {
  return Array.from({ length: 256 }, (_, i) => {
    const at = (i / 255) * (heat.length - 1);
    const [low, high] = [Math.floor(at), Math.ceil(at)].map((j) => parseInt(heat[j].slice(1), 16));
    return [16, 8, 0].map((shift) => {
      const [a, b] = [(low >> shift) & 255, (high >> shift) & 255];
      return a + (b - a) * (at % 1);
    });
  });
}

/** Return the colors of values, 3 bytes each, from dark at `least` to light at `most`. */
function heatOf(values, colors, least, most) {
  const bytes = new Uint8ClampedArray(3 * values.length);
  values.forEach((value, i) => {
    const share = Math.min(Math.max((value - least) / (most - least || 1), 0), 1);
    bytes.set(colors[Math.round(255 * share)], 3 * i);
  });
  return bytes;
}

/** Return a canvas that has a pixel for each 3 bytes. */
function canvasOf(bytes, width, height) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(width, height);
  for (let i = 0, j = 0; i < pixels.data.length; i++) {
    pixels.data[i] = i % 4 === 3 ? 255 : bytes[j++];
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

function heatmap({ rows, columns, values }, colors, least = 0, most = Math.max(...values)) {
  return canvasOf(heatOf(values, colors, least, most), columns, rows);
}

/** Make a canvas as sharp as the screen; return its context, width, height and pixel ratio. */
function cleared(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const wanted = [canvas.clientWidth, canvas.clientHeight].map((side) =>
    Math.max(1, Math.round(side * ratio)));
  if (canvas.width !== wanted[0]) canvas.width = wanted[0];
  if (canvas.height !== wanted[1]) canvas.height = wanted[1];
  return [canvas.getContext("2d"), ...wanted, ratio];
}

/** Draw a part of a photograph, and a map over it. */
function drawOver(context, photo, part, map, wide, high) {
  context.imageSmoothingEnabled = true;
  context.drawImage(photo, ...part, 0, 0, wide, high);
  if (!map) return;
  context.globalAlpha = 0.8;
  context.imageSmoothingEnabled = false;
  context.drawImage(map, 0, 0, wide, high);
  context.globalAlpha = 1;
}

/** Draw the lines between cells of a width and a height in pixels. */
function drawGrid(context, [high, wide], ratio) {
  const { width, height } = context.canvas;
  context.strokeStyle = "rgba(255, 255, 255, 0.6)";
  context.lineWidth = ratio;
  context.beginPath();
  for (let y = high; y < height - 1; y += high) {
    context.moveTo(0, y);
    context.lineTo(width, y);
  }
  for (let x = wide; x < width - 1; x += wide) {
    context.moveTo(x, 0);
    context.lineTo(x, height);
  }
  context.stroke();
}

/** Frame a cell so that light and dark grounds both show it: a white line on either side. */
function drawFrame(context, [row, column], [high, wide], color, thick, inset = 0) {
  const [width, height] = [context.canvas.width, context.canvas.height];
  const edge = Math.ceil(thick / 2);
  const [left, top, right, bottom] = [
    Math.max(column * wide + inset, 2 * edge),
    Math.max(row * high + inset, 2 * edge),
    Math.min((column + 1) * wide - inset, width - 2 * edge),
    Math.min((row + 1) * high - inset, height - 2 * edge),
  ];
  for (const [style, size] of [
    ["#ffffff", thick + 2 * edge],
    [color, thick],
  ]) {
    context.strokeStyle = style;
    context.lineWidth = size;
    context.strokeRect(left, top, right - left, bottom - top);
  }
}

/** Add a small picture: a canvas with a caption that is also its label. */
function addPicture(holder, canvas, caption) {
  const figure = add(holder, "figure");
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", caption);
  canvas.classList.add("small");
  figure.append(canvas);
  add(figure, "figcaption", caption);
  return figure;
}

/** Return a canvas of a map, and its range: values as heat over the photograph, or colors. */
function pictured(photo, map, colors, fromZero = false) {
  if (map.colors) {
    const canvas = canvasOf(map.colors, map.columns, map.rows);
    canvas.classList.add("pixels");
    canvas.style.aspectRatio = `${photo.width} / ${photo.height}`;
    return [canvas, ""];
  }
  const { width, height } = photo;
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const [least, most] = [Math.min(...map.values), Math.max(...map.values)];
  const heat = heatmap(map, colors, fromZero ? 0 : least, most);
  drawOver(canvas.getContext("2d"), photo, [0, 0, width, height], heat, width, height);
  return [canvas, `, from ${written(least)} to ${written(most)}`];
}
