/**
 * GCViT in plain JavaScript: the whole model without a library.
 *
 * The functions stand in the order of the book's chapters and bear the names of the Python ones,
 * in camel case. A tensor is { shape, data }: its axes and a Float32Array, the last axis
 * contiguous. There is one image, so there is no batch axis. `net` is one pass through the model:
 * it finds weights by the names of the official repository, says how a part is switched, and
 * keeps the tensors that were asked for.
 */

const EPSILON = 1e-5; // PyTorch's, in every layer normalization

const size = (shape) => shape.reduce((product, side) => product * side, 1);
const tensor = (shape, data = new Float32Array(size(shape))) => ({ shape, data });
const range = (count) => Array.from({ length: count }, (_, i) => i);
const pair = (value) => (Array.isArray(value) ? value : [value, value]);

/** Add two tensors of one shape. */
function add({ shape, data }, y) {
  const sum = tensor(shape);
  for (let i = 0; i < data.length; i++) sum.data[i] = data[i] + y.data[i];
  return sum;
}

/** Multiply x with y, repeated over the leading axes that it lacks. */
function multiply({ shape, data }, y) {
  const product = tensor(shape), factors = y.data, row = factors.length;
  for (let i = 0; i < data.length; i += row) {
    for (let j = 0; j < row; j++) product.data[i + j] = data[i + j] * factors[j];
  }
  return product;
}

// Chapter 1: the small layers that the rest of the model is made of.

/** Return the share of the standard normal distribution that lies below x, right to 1e-7. */
function normalCdf(x) {
  // The error function after Abramowitz and Stegun 1964, formula 7.1.26.
  const z = Math.abs(x) * Math.SQRT1_2;
  const t = 1 / (1 + 0.3275911 * z);
  const tail = t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)));
  const above = 0.5 * t * (0.254829592 + tail) * Math.exp(-z * z);
  return x < 0 ? above : 1 - above;
}

/** Apply the exact GELU to a tensor, in place. */
export function gelu(x) {
  const { data } = x;
  for (let i = 0; i < data.length; i++) data[i] *= normalCdf(data[i]);
  return x;
}

/**
 * Multiply every token of x, (..., inputs), with a weight, (outputs, inputs).
 *
 * Two tokens meet four outputs at a time, so that each number read is used several times. At an
 * end that is not reached evenly, the last token or output is computed again.
 */
export function dense(x, weight, bias) {
  const [outputs, inputs] = weight.shape;
  const y = tensor([...x.shape.slice(0, -1), outputs]);
  const a = x.data, w = weight.data, b = bias?.data ?? new Float32Array(outputs), out = y.data;
  const last = a.length / inputs - 1;
  for (let i = 0; i <= last; i += 2) {
    const a0 = i * inputs, a1 = Math.min(i + 1, last) * inputs;
    const y0 = i * outputs, y1 = Math.min(i + 1, last) * outputs;
    for (let j = 0; j < outputs; j += 4) {
      const j1 = Math.min(j + 1, outputs - 1), j2 = Math.min(j + 2, outputs - 1);
      const j3 = Math.min(j + 3, outputs - 1);
      const w0 = j * inputs, w1 = j1 * inputs, w2 = j2 * inputs, w3 = j3 * inputs;
      let p0 = b[j], p1 = b[j1], p2 = b[j2], p3 = b[j3], q0 = p0, q1 = p1, q2 = p2, q3 = p3;
      for (let k = 0; k < inputs; k++) {
        const p = a[a0 + k], q = a[a1 + k];
        const u0 = w[w0 + k], u1 = w[w1 + k], u2 = w[w2 + k], u3 = w[w3 + k];
        p0 += p * u0; p1 += p * u1; p2 += p * u2; p3 += p * u3;
        q0 += q * u0; q1 += q * u1; q2 += q * u2; q3 += q * u3;
      }
      out[y0 + j] = p0; out[y0 + j1] = p1; out[y0 + j2] = p2; out[y0 + j3] = p3;
      out[y1 + j] = q0; out[y1 + j1] = q1; out[y1 + j2] = q2; out[y1 + j3] = q3;
    }
  }
  return y;
}

/** Give each token of x mean 0 and variance 1, then the learned scale and shift. */
export function layerNorm(net, name, x) {
  const channels = x.shape.at(-1);
  const scale = net.weight(`${name}.weight`, [channels]).data;
  const shift = net.weight(`${name}.bias`, [channels]).data;
  const y = tensor(x.shape);
  for (let start = 0; start < x.data.length; start += channels) {
    let mean = 0, variance = 0;
    for (let c = 0; c < channels; c++) mean += x.data[start + c] / channels;
    for (let c = 0; c < channels; c++) variance += (x.data[start + c] - mean) ** 2 / channels;
    const inverse = 1 / Math.sqrt(variance + EPSILON);
    for (let c = 0; c < channels; c++) {
      y.data[start + c] = (x.data[start + c] - mean) * inverse * scale[c] + shift[c];
    }
  }
  return y;
}

/** Put a map, (height, width, channels), at (top, left) of a larger one of a value. */
function pad(x, height, width, top = 0, left = 0, value = 0) {
  const [rows, columns, channels] = x.shape;
  if (rows === height && columns === width) return x;
  const y = tensor([height, width, channels]);
  if (value) y.data.fill(value);
  for (let i = 0; i < rows; i++) {
    const row = x.data.subarray(i * columns * channels, (i + 1) * columns * channels);
    y.data.set(row, ((i + top) * width + left) * channels);
  }
  return y;
}

/** Undo `pad` at the right and at the bottom. */
function crop(x, height, width) {
  const [rows, columns, channels] = x.shape;
  if (rows === height && columns === width) return x;
  const y = tensor([height, width, channels]);
  for (let i = 0; i < height; i++) {
    const start = i * columns * channels;
    y.data.set(x.data.subarray(start, start + width * channels), i * width * channels);
  }
  return y;
}

const padByOne = (x, value = 0) => pad(x, x.shape[0] + 2, x.shape[1] + 2, 1, 1, value);

/** Convolve 3x3 with stride 2: a dense layer on the nine tokens around every second one. */
function convolution(net, name, x, outputs, bias) {
  const inputs = x.shape[2];
  // PyTorch's (outputs, inputs, 3, 3) becomes (outputs, 3, 3, inputs): a row is a patch.
  const weight = net.weight(`${name}.weight`, [outputs, inputs, 3, 3], ({ data }) => tensor(
    [outputs, 9 * inputs],
    data.map((_, i) => {
      const [o, tap, c] = [Math.floor(i / (9 * inputs)), Math.floor(i / inputs) % 9, i % inputs];
      return data[(o * inputs + c) * 9 + tap];
    }),
  ));
  const padded = padByOne(x);
  const [height, width] = [Math.ceil(x.shape[0] / 2), Math.ceil(x.shape[1] / 2)];
  const patches = tensor([height, width, 9 * inputs]);
  let at = 0;
  for (let i = 0; i < height; i++) {
    for (let j = 0; j < width; j++) {
      for (let row = 0; row < 3; row++, at += 3 * inputs) {
        const start = ((2 * i + row) * padded.shape[1] + 2 * j) * inputs;
        patches.data.set(padded.data.subarray(start, start + 3 * inputs), at);
      }
    }
  }
  return dense(patches, weight, bias && net.weight(`${name}.bias`, [outputs]));
}

/** Convolve each channel with a 3x3 window of its own. */
function depthwise(net, name, x) {
  const [height, width, channels] = x.shape;
  // (channels, 1, 3, 3) becomes (9, channels), in the order of the map's numbers.
  const w = net.weight(`${name}.weight`, [channels, 1, 3, 3], ({ data }) => tensor(
    [9, channels], data.map((_, i) => data[(i % channels) * 9 + Math.floor(i / channels)]),
  )).data;
  const a = padByOne(x).data;
  const y = tensor(x.shape), out = y.data;
  for (let i = 0, to = 0; i < height; i++) for (let j = 0; j < width; j++, to += channels) {
    for (let tap = 0; tap < 9; tap++) {
      const from = ((i + Math.floor(tap / 3)) * (width + 2) + j + (tap % 3)) * channels;
      const weights = tap * channels;
      for (let c = 0; c < channels; c++) out[to + c] += a[from + c] * w[weights + c];
    }
  }
  return y;
}

function meanOverPlaces(x) {
  const channels = x.shape.at(-1), places = x.data.length / channels;
  const sums = new Float64Array(channels);
  for (let i = 0; i < x.data.length; i += channels) {
    for (let c = 0; c < channels; c++) sums[c] += x.data[i + c];
  }
  return tensor([channels], Float32Array.from(sums, (sum) => sum / places));
}

/** Scale each channel of a map by a gate that is computed from all channels' averages. */
export function squeezeAndExcitation(net, name, x) {
  const channels = x.shape[2];
  const hidden = Math.floor(channels / 4);
  const way = net.switch("gates", name) ?? "own";
  if (!["own", "place", "open", "shut"].includes(way)) {
    throw new Error(`Gates are "own", "place", "open" or "shut"; got ${way} for ${name}.`);
  }
  // Gates of each place see no other place: they are computed from its own channels.
  const means = net.keep(`${name}.means`, way === "place" ? x : meanOverPlaces(x));
  const gates = dense(
    gelu(dense(means, net.weight(`${name}.fc.0.weight`, [hidden, channels]))),
    net.weight(`${name}.fc.2.weight`, [channels, hidden]),
  );
  const sigmoid = (value) => 1 / (1 + Math.exp(-value));
  gates.data = way === "open" || way === "shut"
    ? gates.data.fill(Number(way === "open")) : gates.data.map(sigmoid);
  return multiply(x, net.keep(`${name}.gates`, gates));
}

/** Depthwise 3x3, GELU, squeeze-and-excitation, 1x1: the branch beside a map. */
export function fusedMbconv(net, name, x) {
  const channels = x.shape[2];
  const gated = squeezeAndExcitation(net, `${name}.2`, gelu(depthwise(net, `${name}.0`, x)));
  const mix = net.weight(`${name}.3.weight`, [channels, channels, 1, 1],
    ({ data }) => tensor([channels, channels], data));
  return dense(gated, mix);
}

/** Halve height and width with a convolution. */
export function reduceSize(net, name, x, channels = 2 * x.shape[2]) {
  x = layerNorm(net, `${name}.norm1`, x);
  x = add(x, fusedMbconv(net, `${name}.conv`, x));
  x = convolution(net, `${name}.reduction`, x, channels, false);
  return layerNorm(net, `${name}.norm2`, x);
}

/** Two dense layers with a GELU between them, on each token alone. */
export function mlp(net, name, x) {
  const channels = x.shape.at(-1);
  const hidden = Math.floor(channels * net.config.mlp_ratio);
  const layer = (part, shape, input) => dense(
    input,
    net.weight(`${name}.${part}.weight`, shape),
    net.weight(`${name}.${part}.bias`, shape.slice(0, 1)),
  );
  return layer("fc2", [channels, hidden], gelu(layer("fc1", [hidden, channels], x)));
}

// Chapter 2: from pixels to the first tokens.

/** Turn an image into a map of overlapping patch embeddings, a quarter as high and wide. */
export function patchEmbed(net, name, image) {
  const channels = net.config.embed_dim;
  const x = convolution(net, `${name}.proj`, image, channels, true);
  return net.keep(name, reduceSize(net, `${name}.conv_down`, x, channels));
}

// Chapter 3: the whole map, made small enough to be a window.

/** Return the rows of the matrix that resizes a line of samples (Keys' kernel, a = -0.75). */
export function bicubicMatrix(sizeIn, sizeOut) {
  const a = -0.75;
  return range(sizeOut).map((out) => {
    const row = new Float64Array(sizeIn);
    const center = ((out + 0.5) * sizeIn) / sizeOut - 0.5;
    for (let tap = Math.floor(center) - 1; tap <= Math.floor(center) + 2; tap++) {
      const d = Math.abs(center - tap);
      const near = ((a + 2) * d - (a + 3)) * d * d + 1;
      const far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a;
      row[Math.min(Math.max(tap, 0), sizeIn - 1)] += d <= 1 ? near : far; // borders repeated
    }
    return row;
  });
}

/** Resize a map, (height, width, channels), to another height and width. */
export function resizeBicubic(x, [height, width]) {
  const [rows, columns, channels] = x.shape;
  if (rows === height && columns === width) return x;
  const y = tensor([height, width, channels]);
  const [down, right] = [bicubicMatrix(rows, height), bicubicMatrix(columns, width)];
  for (const i of range(height)) for (const j of range(width)) {
    for (const p of range(rows)) for (const q of range(columns)) {
      const share = down[i][p] * right[j][q];
      const [to, from] = [(i * width + j) * channels, (p * columns + q) * channels];
      if (share) for (let c = 0; c < channels; c++) y.data[to + c] += share * x.data[from + c];
    }
  }
  return y;
}

/** Refine a map with a fused MBConv, then halve it by 3x3 max pooling with stride 2. */
export function featureExtraction(net, name, x, keepdims) {
  x = add(x, fusedMbconv(net, `${name}.conv`, x));
  if (keepdims) return net.keep(name, x);
  const [height, width] = [Math.ceil(x.shape[0] / 2), Math.ceil(x.shape[1] / 2)];
  const channels = x.shape[2];
  // The border must never win. Zeros, the original notebook's fault, beat what is negative.
  const padded = padByOne(x, net.switch("zeroPadding", name) ? 0 : -Infinity);
  const y = tensor([height, width, channels]);
  y.data.fill(-Infinity);
  for (let i = 0; i < height; i++) for (let j = 0; j < width; j++) {
    const out = (i * width + j) * channels;
    for (let tap = 0; tap < 9; tap++) {
      const row = 2 * i + Math.floor(tap / 3);
      const from = (row * padded.shape[1] + 2 * j + (tap % 3)) * channels;
      for (let c = 0; c < channels; c++) {
        if (padded.data[from + c] > y.data[out + c]) y.data[out + c] = padded.data[from + c];
      }
    }
  }
  return net.keep(name, y);
}

/** Whether each step of a level's generator keeps the size: the published flags. */
const KEEPDIMS = [[false, false, false], [false, false], [true], [true]];

/** Make the global query: the whole map in the size of one window. */
export function globalQueryGenerator(net, name, x, keepdims) {
  return keepdims.reduce(
    (map, flag, i) => featureExtraction(net, `${name}.to_q_global.${i}`, map, flag), x);
}

// Chapter 4: attention inside a window, with a local or with a global query.

/** Return which row of the position table belongs to each (query token, key token). */
export function relativePositionIndex([height, width]) {
  const tokens = range(height * width);
  const place = tokens.map((token) => [Math.floor(token / width), token % width]);
  return tokens.flatMap((i) => tokens.map((j) => {
    const [down, right] = [place[i][0] - place[j][0], place[i][1] - place[j][1]];
    return (down + height - 1) * (2 * width - 1) + right + width - 1;
  }));
}

/** Return what keeps the parts of a window apart, (tokens, tokens): 0 within a part, or -1e9. */
export function blockMask([height, width], [h, w]) {
  const part = range(height * width).map((token) =>
    Math.floor(token / width / h) * width + Math.floor((token % width) / w));
  return part.flatMap((one) => part.map((other) => (one === other ? 0 : -1e9)));
}

/** Return the bias that is added to the scores, (heads, query tokens, key tokens). */
export function relativePositionBias(net, name, window, heads) {
  const index = relativePositionIndex(window);
  const rows = (2 * window[0] - 1) * (2 * window[1] - 1);
  const table = net.weight(`${name}.relative_position_bias_table`, [rows, heads]).data;
  const tokens = size(window);
  const bias = tensor([heads, tokens, tokens]);
  const part = net.switch("part", name);
  const mask = part && blockMask(window, pair(part));
  const way = net.switch("bias", name) ?? "on";
  if (way !== "on" && way !== "off") throw new Error(`A bias is "on" or "off"; got ${way}.`);
  const flat = net.switch("flatGather", name); // the original notebook's fault
  for (let head = 0; head < heads; head++) {
    for (let i = 0; i < index.length; i++) {
      const position = way === "off" ? 0 : table[flat ? index[i] : index[i] * heads + head];
      bias.data[head * index.length + i] = position + (mask ? mask[i] : 0);
    }
  }
  return bias;
}

/** Deal part `which` of each token's channels out: (windows, heads, tokens, head channels). */
function splitHeads(x, heads, channels, which = 0) {
  const [windows, tokens, width] = x.shape;
  const share = channels / heads;
  const y = tensor([windows, heads, tokens, share]);
  let out = 0;
  for (let n = 0; n < windows; n++) for (let head = 0; head < heads; head++) {
    for (let token = 0; token < tokens; token++, out += share) {
      const start = (n * tokens + token) * width + which * channels + head * share;
      for (let d = 0; d < share; d++) y.data[out + d] = x.data[start + d];
    }
  }
  return y;
}

/** Return query, key and value of windows, (windows, tokens, channels); a global query has one. */
export function queryKeyValue(net, name, x, heads, qGlobal) {
  const channels = x.shape[2];
  const parts = qGlobal ? 2 : 3;
  const bias = net.config.qkv_bias ? net.weight(`${name}.qkv.bias`, [parts * channels]) : null;
  const qkv = dense(x, net.weight(`${name}.qkv.weight`, [parts * channels, channels]), bias);
  const own = range(parts).map((which) => splitHeads(qkv, heads, channels, which));
  if (!qGlobal) return own;
  return [splitHeads(tensor([1, x.shape[1], channels], qGlobal.data), heads, channels), ...own];
}

/** Return scores before the bias, and weights, each (windows, heads, query token, key token). */
export function weightsOf(q, k, bias, scale) {
  const [windows, heads, tokens, share] = k.shape;
  const scores = tensor([windows, heads, tokens, tokens]);
  const weights = tensor(scores.shape);
  const a = q.data, b = k.data, added = bias.data, raw = scores.data, out = weights.data;
  const matrix = tokens * share;
  for (let n = 0, row = 0; n < windows * heads; n++) {
    const query = (q.shape[0] === 1 ? n % heads : n) * matrix;
    for (let i = 0; i < tokens; i++, row += tokens) {
      const from = query + i * share;
      const biases = ((n % heads) * tokens + i) * tokens;
      let most = -Infinity, sum = 0;
      for (let j = 0; j < tokens; j++) {
        const key = n * matrix + j * share;
        let score = 0;
        for (let d = 0; d < share; d++) score += a[from + d] * b[key + d];
        raw[row + j] = score * scale;
        out[row + j] = score * scale + added[biases + j];
        most = Math.max(most, out[row + j]);
      }
      // The softmax. Without the largest score taken off, exp could exceed all numbers.
      for (let j = 0; j < tokens; j++) sum += out[row + j] = Math.exp(out[row + j] - most);
      for (let j = 0; j < tokens; j++) out[row + j] /= sum;
    }
  }
  return { scores, weights };
}

/** Multi-head attention among the tokens of each window, (windows, tokens, channels). */
export function windowAttention(net, name, x, { window, heads }, qGlobal) {
  const channels = x.shape[2];
  const share = channels / heads;
  const [q, k, v] = queryKeyValue(net, name, x, heads, qGlobal);
  const bias = relativePositionBias(net, name, window, heads);
  const { scores, weights } = weightsOf(q, k, bias, net.config.qk_scale ?? share ** -0.5);
  for (const [part, value] of Object.entries({ q, k, v, scores, bias, weights })) {
    net.keep(`${name}.${part}`, value);
  }
  const [windows, tokens] = x.shape;
  const off = net.switch("headsOff", name) ?? [];
  const mixed = tensor(x.shape);
  const a = weights.data, values = v.data, out = mixed.data;
  for (let n = 0; n < windows; n++) for (let head = 0; head < heads; head++) {
    if (off.includes(head)) continue;
    const start = (n * heads + head) * tokens;
    for (let i = 0; i < tokens; i++) {
      const row = (start + i) * tokens, to = (n * tokens + i) * channels + head * share;
      for (let j = 0; j < tokens; j++) {
        const weight = a[row + j], from = (start + j) * share;
        for (let d = 0; d < share; d++) out[to + d] += weight * values[from + d];
      }
    }
  }
  const output = dense(mixed, net.weight(`${name}.proj.weight`, [channels, channels]),
    net.weight(`${name}.proj.bias`, [channels]));
  return net.keep(`${name}.output`, output);
}

// Chapter 5: attention and MLP, each with its residual, on a map cut into windows.

/** Visit a map's rows within windows: their start in the map and in the windows' tokens. */
function eachWindowRow([height, width, channels], [h, w], visit) {
  let start = 0;
  for (let top = 0; top < height; top += h) for (let left = 0; left < width; left += w) {
    for (let i = 0; i < h; i++, start += w * channels) {
      visit(((top + i) * width + left) * channels, start, w * channels);
    }
  }
}

/** Cut a map, (height, width, channels), into (windows, tokens, channels). */
export function windowPartition(x, window) {
  const y = tensor([size(x.shape.slice(0, 2)) / size(window), size(window), x.shape[2]]);
  eachWindowRow(x.shape, window, (inMap, inWindows, length) =>
    y.data.set(x.data.subarray(inMap, inMap + length), inWindows));
  return y;
}

/** Put windows back together: the inverse of windowPartition. */
export function windowReverse(windows, window, shape) {
  const y = tensor(shape);
  eachWindowRow(shape, window, (inMap, inWindows, length) =>
    y.data.set(windows.data.subarray(inWindows, inWindows + length), inMap));
  return y;
}

/** Attend in windows. A map they do not divide is padded at the right and at the bottom. */
function attend(net, name, x, { window, heads }, qGlobal) {
  const [height, width, channels] = x.shape;
  const [h, w] = [0, 1].map((axis) => Math.ceil(x.shape[axis] / window[axis]) * window[axis]);
  const windows = windowPartition(pad(x, h, w), window);
  const y = windowReverse(windowAttention(net, name, windows, { window, heads }, qGlobal),
    window, [h, w, channels]);
  return crop(y, height, width);
}

/** The learned factors on a branch, where the model has them. */
function scaled(net, name, x) {
  if (net.config.layer_scale == null) return x;
  return multiply(x, net.weight(name, [x.shape.at(-1)]));
}

/** One transformer block on windows: attention plus residual, MLP plus residual. */
export function block(net, name, x, sizes, qGlobal) {
  const attended = attend(net, `${name}.attn`, layerNorm(net, `${name}.norm1`, x), sizes, qGlobal);
  x = add(x, scaled(net, `${name}.gamma1`, attended));
  const mixed = mlp(net, `${name}.mlp`, layerNorm(net, `${name}.norm2`, x));
  return net.keep(name, add(x, scaled(net, `${name}.gamma2`, mixed)));
}

// Chapter 6: blocks that take turns, local and global, at one resolution.

/** Return the global query of a level's map, (window height, window width, channels). */
function qGlobal(net, name, x, window, keepdims) {
  const shape = [...window, x.shape[2]];
  const way = net.switch("query", name) ?? "own";
  if (way === "zero") return tensor(shape);
  if (way.data) {
    if (String(way.shape) !== String(shape)) {
      throw new Error(`The query of ${name} has the shape ${shape}; got one of ${way.shape}.`);
    }
    return way;
  }
  if (way !== "own" && way !== "constant") {
    throw new Error(`A query is "own", "constant", "zero" or a tensor; got ${way} for ${name}.`);
  }
  // A map of ones gives a query that was learned, but is the same for every image.
  const map = way === "own" ? x : tensor(x.shape, new Float32Array(x.data.length).fill(1));
  return resizeBicubic(globalQueryGenerator(net, name, map, keepdims), window);
}

/**
 * A stage: a global query, blocks in turn local and global, downsampling.
 *
 * It is returned in steps, [name, function from state to state], so that a switch costs no more
 * than the steps from its own on. Their state is { x, q }, the map and the level's global query.
 */
export function level(config, i) {
  const [name, depth, last] = [`levels.${i}`, config.depths[i], i + 1 === config.depths.length];
  const sizes = { window: pair(config.window_size[i]), heads: config.num_heads[i] };
  const generator = `${name}.q_global_gen`;
  const steps = [[generator, (net, { x }) => {
    const q = qGlobal(net, generator, x, sizes.window, KEEPDIMS[i]);
    return { x, q: net.keep(`${name}.q_global`, q) };
  }]];
  for (const j of range(depth)) {
    steps.push([`${name}.blocks.${j}`, (net, { x, q }) => {
      x = block(net, `${name}.blocks.${j}`, x, sizes, j % 2 ? q : null);
      if (j === depth - 1) net.keep(name, x);
      return { x, q };
    }]);
  }
  const downsample = `${name}.downsample`;
  const halve = (net, { x }) => ({ x: net.keep(downsample, reduceSize(net, downsample, x)) });
  if (!last) steps.push([downsample, halve]);
  return steps;
}

// Chapter 7: the whole model.

/** Return the steps of a model: stem, levels, and pooling and head, which leave the logits. */
export function gcvit(config) {
  return [
    ["patch_embed", (net, { x }) => ({ x: patchEmbed(net, "patch_embed", x) })],
    ...config.depths.flatMap((_, i) => level(config, i)),
    ["head", (net, { x }) => {
      x = net.keep("norm", layerNorm(net, "norm", x));
      if (config.pooling === null) return { x };
      x = net.keep("pool", meanOverPlaces(x));
      if (!config.include_top) return { x };
      const weight = net.weight("head.weight", [config.num_classes, x.shape[0]]);
      x = net.keep("head", dense(x, weight, net.weight("head.bias", [config.num_classes])));
      return { x, logits: x.data };
    }],
  ];
}

const DEFAULTS = {
  in_channels: 3, mlp_ratio: 3, qkv_bias: true, qk_scale: null, layer_scale: null,
  include_top: true, pooling: "avg", num_classes: 1000,
};
const [GENERATORS, BLOCKS] = [/\.q_global_gen$/, /\.blocks\.\d+$/];
/** The switches, and the names of the steps that each of them can change. */
const SWITCHES = {
  query: GENERATORS,
  gates: /^patch_embed$|\.q_global_gen$|\.downsample$/,
  part: BLOCKS,
  headsOff: BLOCKS,
  bias: BLOCKS,
  flatGather: BLOCKS,
  zeroPadding: GENERATORS,
};
const SMALLEST_IMAGE = 32;

const isByName = (value) => value?.constructor === Object && !value.data;
const isWithin = (name, part) => name === part || name.startsWith(`${part}.`);

function isSame(one, other) {
  if (typeof one !== "object" || !one || !other) return one === other;
  if (ArrayBuffer.isView(one)) {
    return one.length === other.length && one.every((value, i) => value === other[i]);
  }
  const keys = Object.keys(one);
  return keys.length === Object.keys(other).length
    && keys.every((key) => isSame(one[key], other[key]));
}

/** One pass through one step: where the functions above find weights and leave tensors. */
class Pass {
  constructor(model, switches, patterns) {
    Object.assign(this, { config: model.config, tensors: {}, model, switches, patterns });
  }

  /** Return a weight that must have a shape. A layout is applied once and remembered. */
  weight(name, shape, layout = (weight) => weight) {
    const { laidOut, weights } = this.model;
    if (!laidOut.has(name)) {
      const has = weights[name]?.shape;
      if (String(has) !== String(shape)) {
        throw new Error(`The model wants ${name} of shape (${shape}); the checkpoint has `
          + `${has ? `(${has})` : "no such weight"}.`);
      }
      laidOut.set(name, layout(weights[name]));
    }
    return laidOut.get(name);
  }

  /** Return how a part is switched: by the longest name that it lies within. */
  switch(kind, name) {
    const value = this.switches[kind];
    if (!isByName(value)) return value;
    const parts = Object.keys(value).filter((part) => isWithin(name, part));
    return value[parts.sort((one, other) => other.length - one.length)[0]];
  }

  keep(name, x) {
    if (this.patterns.some((pattern) => pattern.test(name))) this.tensors[name] = x;
    return x;
  }
}

class Model {
  constructor({ tensors, metadata }, config) {
    const written = (name) => (metadata[name] === undefined ? null : JSON.parse(metadata[name]));
    config = { ...DEFAULTS, ...(config ?? written("config")) };
    const { window_size: windows, depths, num_heads: heads } = config;
    const levels = depths?.length;
    if (!KEEPDIMS[levels - 1] || windows?.length !== levels || heads?.length !== levels) {
      throw new Error("A config has window_size, depths and num_heads, for each of 1 to "
        + `${KEEPDIMS.length} levels; got ${JSON.stringify({ windows, depths, heads })}.`);
    }
    this.config = config;
    this.weights = tensors;
    this.laidOut = new Map();
    this.steps = gcvit(config);
    this.cache = [];
    this.classes = written("classes");
    this.imageSize = written("image_size");
    this.crop = written("crop") ?? 1;
    this.mean = written("mean") ?? [123.675, 116.28, 103.53];
    this.std = written("std") ?? [58.395, 57.12, 57.375];
    // A pass over an empty image finds, checks and lays out every weight.
    this.forward(new Float32Array(SMALLEST_IMAGE ** 2 * config.in_channels), 32, 32, {});
    const extra = Object.keys(tensors).filter((name) => !this.laidOut.has(name)
      && !name.endsWith("relative_position_index")); // a constant, not a weight
    if (extra.length) throw new Error(`The checkpoint has what no layer wants: ${extra}.`);
  }

  /**
   * Run the model on an image of normalized values, (height, width, 3).
   *
   * Options: `keep` lists the names of the tensors to return; a * stands for any letters, and
   * the default is all. `switches` gives each of SWITCHES one value for the whole model, or an
   * object from the names of parts ("levels.2", "levels.0.blocks.1.attn") to values:
   *   query: "own", "constant" (of a map of ones), "zero", or the { shape, data } of another;
   *   gates: "own", "place" (each place computes its own), "open" (1) or "shut" (0);
   *   part: side of the parts that windows fall into; headsOff: heads whose output is zero;
   *   bias: "on" or "off"; flatGather, zeroPadding: true for a fault of the original notebook.
   *
   * Returns logits, tensors by name, and the names of the steps that were computed. For the
   * image of the last run, that begins at the first step that a switch changes: do not write
   * into the tensors, which the model keeps.
   */
  async run(image, height, width, options = {}) {
    return this.forward(image, height, width, options);
  }

  forward(image, height, width, { switches = {}, keep = ["*"] }) {
    const shape = [height, width, this.config.in_channels];
    if (image.length !== size(shape) || Math.min(height, width) < SMALLEST_IMAGE) {
      throw new Error(`An image has height x width x ${shape[2]} values and sides of at least `
        + `${SMALLEST_IMAGE} px; got ${image.length} values for ${height} x ${width} px.`);
    }
    this.checkSwitches(switches);
    const escaped = keep.map((name) => name.replace(/[.+?^${}()|[\]\\]/g, "\\$&"));
    const patterns = escaped.map((name) => new RegExp(`^${name.replaceAll("*", ".*")}$`));
    let state = { x: tensor(shape, image) };
    if (!isSame(this.input, { state, keep })) this.cache = [];
    this.input = { state: { x: tensor(shape, image.slice()) }, keep };
    const computed = [];
    this.steps.forEach(([name, step], i) => {
      const settings = this.settingsOf(name, switches);
      if (!isSame(this.cache[i]?.settings, settings)) {
        this.cache.length = i; // all that lies behind this step too
        const pass = new Pass(this, switches, patterns);
        this.cache.push({ settings, state: step(pass, state), tensors: pass.tensors });
        computed.push(name);
      }
      state = this.cache[i].state;
    });
    const tensors = Object.assign({}, ...this.cache.map((step) => step.tensors));
    return { logits: state.logits ?? null, tensors, computed };
  }

  checkSwitches(switches) {
    for (const [kind, value] of Object.entries(switches)) {
      if (!SWITCHES[kind]) {
        throw new Error(`The switches are ${Object.keys(SWITCHES).join(", ")}; got ${kind}.`);
      }
      for (const part of isByName(value) ? Object.keys(value) : []) {
        if (!this.steps.some(([name]) => isWithin(name, part) || isWithin(part, name))) {
          throw new Error(`The model has no part ${part}, for which ${kind} is switched.`);
        }
      }
    }
  }

  /** Return the switches that a step can see, to tell whether it must be computed again. */
  settingsOf(name, switches) {
    const seen = Object.entries(switches).filter(([kind]) => SWITCHES[kind].test(name));
    return seen.flatMap(([kind, value]) => (isByName(value)
      ? Object.entries(value).filter(([part]) => isWithin(name, part) || isWithin(part, name))
        .map(([part, way]) => [kind, part, way])
      : [[kind, value]]));
  }
}

/**
 * Make a model of what readSafetensors returned.
 *
 * The file's header has the `config`; one that is given replaces it. `classes`, `imageSize`,
 * `crop`, `mean` and `std` are the header's too, or `null`, 1 and those of ImageNet.
 */
export const createModel = (file, config) => new Model(file, config);

/** Turn logits into probabilities. */
export function softmax(logits) {
  const most = Math.max(...logits);
  const powers = Array.from(logits, (logit) => Math.exp(logit - most));
  const sum = powers.reduce((total, power) => total + power);
  return powers.map((power) => power / sum);
}

// What a page shows besides.

/** Return what each place of the last map adds to the logit of a class, (height, width). */
export function classActivation(model, { norm }, label) {
  const channels = norm.shape[2];
  const weight = model.laidOut.get("head.weight").data.subarray(label * channels);
  const y = tensor(norm.shape.slice(0, 2));
  for (let i = 0; i < norm.data.length; i++) {
    y.data[Math.floor(i / channels)] += (norm.data[i] * weight[i % channels]) / y.data.length;
  }
  return y;
}

/** Return the arithmetic behind one weight of a block: of a window, head, query and key. */
export function explainWeight(model, tensors, name, { window, head, query, key }) {
  const [q, k, scores, bias, weights] = ["q", "k", "scores", "bias", "weights"].map(
    (part) => tensors[`${name}.attn.${part}`]);
  const [, heads, tokens, share] = k.shape;
  const vector = (x, n, token) =>
    x.data.subarray(((n * heads + head) * tokens + token) * share).slice(0, share);
  const row = ((window * heads + head) * tokens + query) * tokens;
  const biasRow = (head * tokens + query) * tokens;
  const terms = range(tokens).map((j) => scores.data[row + j] + bias.data[biasRow + j]);
  const most = Math.max(...terms);
  const [a, b] = [vector(q, q.shape[0] === 1 ? 0 : window, query), vector(k, window, key)];
  const products = a.map((value, d) => value * b[d]);
  return {
    q: a,
    k: b,
    products,
    dot: products.reduce((total, product) => total + product, 0),
    scale: model.config.qk_scale ?? share ** -0.5,
    score: scores.data[row + key],
    bias: bias.data[biasRow + key],
    exp: Math.exp(terms[key] - most),
    sum: terms.reduce((total, term) => total + Math.exp(term - most), 0),
    weight: weights.data[row + key],
  };
}

// Files and images.

/** Read two bytes for each number, whose bits `widen` puts where a float32 has them. */
function readHalf(buffer, widen) {
  const halves = new Uint16Array(buffer, 0, Math.floor(buffer.byteLength / 2));
  const data = new Float32Array(halves.length);
  const bits = new Uint32Array(data.buffer);
  for (let i = 0; i < bits.length; i++) bits[i] = widen(halves[i]);
  return data;
}

// A file that was cut off may end within a number, which is left out.
const READERS = {
  F32: (buffer) => new Float32Array(buffer, 0, Math.floor(buffer.byteLength / 4)),
  // The upper half of a float32.
  BF16: (buffer) => readHalf(buffer, (bits) => bits << 16),
  // Three bits fewer for the exponent, which counts from 15 and not from 127. What is not
  // finite would come out as 2^16 or more, which no finite float16 is.
  F16: (buffer) => readHalf(buffer, (bits) => ((bits & 0x8000) << 16) | ((bits & 0x7fff) << 13))
    .map((value) => (Math.abs(value *= 2 ** 112) < 2 ** 16 ? value : NaN)),
};

/** Read the tensors of a .safetensors file, as float32, and the metadata in its header. */
export function readSafetensors(buffer) {
  const length = buffer.byteLength < 8 ? 0 : Number(new DataView(buffer).getBigUint64(0, true));
  if (!length || 8 + length > buffer.byteLength) {
    throw new Error(`No .safetensors file: its header should take ${length} bytes, and there are `
      + `${buffer.byteLength} in all.`);
  }
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const { __metadata__: metadata = {}, ...entries } = header;
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets: [start, end] }] of Object.entries(entries)) {
    if (!READERS[dtype]) {
      if (name.endsWith("relative_position_index")) continue;
      throw new Error(`${name} holds ${dtype}; ${Object.keys(READERS)} can be read.`);
    }
    const data = READERS[dtype](buffer.slice(8 + length + start, 8 + length + end));
    if (data.length !== size(shape)) {
      throw new Error(`${name} should hold ${size(shape)} numbers; the file has ${data.length}.`);
    }
    if (!data.every(Number.isFinite)) throw new Error(`${name} holds values that are not finite.`);
    tensors[name] = tensor(shape, data);
  }
  return { tensors, metadata };
}

/** Return the box (left, top, right, bottom) in the middle of an image that a model looks at. */
export function centerBox(height, width, [h, w], crop = 1) {
  const scale = crop * Math.min(height / h, width / w);
  const [left, top] = [(width - w * scale) / 2, (height - h * scale) / 2];
  return [left, top, left + w * scale, top + h * scale];
}

const BITS = 22; // of a weight's fraction, in Pillow

/** Return, for each sample out, the first sample in and whole-numbered weights, as Pillow does. */
function pillowWeights(sizeIn, start, end, sizeOut) {
  [start, end] = [Math.fround(start), Math.fround(end)]; // Pillow's box is in single precision
  const scale = Math.fround(end - start) / sizeOut;
  const stretch = Math.max(scale, 1); // a smaller image averages over more samples
  const cubic = (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1
    : x < 2 ? ((x - 5) * x + 8) * x * -0.5 + 2 : 0);
  return range(sizeOut).map((out) => {
    const center = start + (out + 0.5) * scale;
    const first = Math.max(Math.trunc(center - 2 * stretch + 0.5), 0);
    const last = Math.min(Math.trunc(center + 2 * stretch + 0.5), sizeIn);
    const weights = range(last - first).map(
      (i) => cubic(Math.abs((i + first - center + 0.5) / stretch)));
    const sum = weights.reduce((total, weight) => total + weight, 0);
    return [first, weights.map((weight) => {
      const scaled = (weight / sum) * 2 ** BITS;
      return Math.trunc(scaled + (scaled < 0 ? -0.5 : 0.5));
    })];
  });
}

/**
 * Resize the box of an image as Pillow's BICUBIC does: along rows, rounded to bytes, then down.
 *
 * `pixels` are bytes, (height, width, 3) or, with an alpha that is left out, (height, width, 4).
 * Returns a Uint8ClampedArray of [h, w, 3].
 */
export function resize(pixels, height, width, [h, w], box = [0, 0, width, height]) {
  const stride = pixels.length / (height * width);
  if (stride !== 3 && stride !== 4) {
    throw new Error(`${height} x ${width} px have 3 or 4 bytes each; got ${pixels.length} bytes.`);
  }
  const round = (sum) => (sum + 2 ** (BITS - 1)) >> BITS; // a clamped array cuts to 0 to 255
  const across = new Uint8ClampedArray(height * w * 3);
  pillowWeights(width, box[0], box[2], w).forEach(([first, weights], j) => {
    for (let i = 0; i < height; i++) for (let c = 0; c < 3; c++) {
      let sum = 0, from = (i * width + first) * stride + c;
      for (let n = 0; n < weights.length; n++, from += stride) sum += pixels[from] * weights[n];
      across[(i * w + j) * 3 + c] = round(sum);
    }
  });
  const y = new Uint8ClampedArray(h * w * 3);
  pillowWeights(height, box[1], box[3], h).forEach(([first, weights], i) => {
    for (let at = 0; at < w * 3; at++) {
      let sum = 0, from = first * w * 3 + at;
      for (let n = 0; n < weights.length; n++, from += w * 3) sum += across[from] * weights[n];
      y[i * w * 3 + at] = round(sum);
    }
  });
  return y;
}

/** Return pixels, (height, width, 3) from 0 to 255, as a model takes them. */
export const normalize = (pixels, { mean, std }) =>
  Float32Array.from(pixels, (value, i) => (value - mean[i % 3]) / std[i % 3]);

/** Return an image of any size as a model takes it: { image, height, width, pixels }. */
export function prepare(pixels, height, width, { imageSize, crop, mean, std }) {
  const [h, w] = pair(imageSize);
  const resized = resize(pixels, height, width, [h, w], centerBox(height, width, [h, w], crop));
  return { image: normalize(resized, { mean, std }), height: h, width: w, pixels: resized };
}
