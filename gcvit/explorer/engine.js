/**
 * GCViT in plain JavaScript: the whole model without a library.
 *
 * The functions stand in the order of the book's chapters and bear the names of the Python ones,
 * in camel case. A tensor is { shape, data }: its axes and a Float32Array, the last axis
 * contiguous; tensors.js adds and multiplies them. There is one image, so no batch axis.
 *
 * A layer in Python holds its weights; a function here is given `net`, the `Model` of model.js,
 * and the layer's name in the checkpoint. `net.weight` finds a weight, `net.switch` says how a
 * part is switched, `net.keep` notes a tensor for whoever asked for it, and `net.stage` computes
 * a part of the model only where something that it depends on has changed.
 */

import { maskParts, switchQuery } from "./laboratory.js";
import { add, matmul, matrix, multiply, range, softmax, tensor, transpose } from "./tensors.js";

export { createModel } from "./model.js";
export { readSafetensors } from "./readers.js";

const EPSILON = 1e-5; // PyTorch's, in every layer normalization

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
function gelu(x) {
  const { data } = x;
  for (let i = 0; i < data.length; i++) data[i] *= normalCdf(data[i]);
  return x;
}

/** Apply a dense layer to each token of x: (..., inputs) to (..., outputs). */
function dense(net, name, x, outputs, { bias = true, shape, layout } = {}) {
  const inputs = x.shape.at(-1);
  const weight = net.weight(`${name}.weight`, shape ?? [outputs, inputs], layout);
  const y = tensor([...x.shape.slice(0, -1), outputs]);
  matmul(x.data, weight, inputs, y.data, outputs,
    bias ? net.weight(`${name}.bias`, [outputs]) : undefined);
  return y;
}

/** Give each token of x mean 0 and variance 1, then the learned scale and shift. */
function layerNorm(net, name, x) {
  const channels = x.shape.at(-1);
  const scale = net.weight(`${name}.weight`, [channels]);
  const shift = net.weight(`${name}.bias`, [channels]);
  const y = tensor(x.shape), from = x.data, to = y.data;
  for (let start = 0; start < from.length; start += channels) {
    let mean = 0, variance = 0;
    for (let c = 0; c < channels; c++) mean += from[start + c];
    mean /= channels;
    for (let c = 0; c < channels; c++) variance += (from[start + c] - mean) ** 2;
    const inverse = 1 / Math.sqrt(variance / channels + EPSILON);
    for (let c = 0; c < channels; c++) {
      to[start + c] = (from[start + c] - mean) * inverse * scale[c] + shift[c];
    }
  }
  return y;
}

/** Return the (height, width) of a map of which every `stride`-th row and column is left. */
const strided = ([height, width], stride) => [height, width].map((n) => Math.ceil(n / stride));

/**
 * Visit the 3x3 places around every `stride`-th place of a map.
 *
 * `visit` is told at which number the output's place begins, at which the input's, and which of
 * the nine this is. It is not called for what lies outside of the map: a sum would get zeros from
 * there. `visitOutside` is, with the output's place.
 */
function eachTap([rows, columns, channels], stride, visit, visitOutside = () => {}) {
  const [height, width] = strided([rows, columns], stride);
  for (let i = 0, to = 0; i < height; i++) for (let j = 0; j < width; j++, to += channels) {
    for (let tap = 0; tap < 9; tap++) {
      const row = stride * i + Math.floor(tap / 3) - 1, column = stride * j + (tap % 3) - 1;
      if (row >= 0 && row < rows && column >= 0 && column < columns) {
        visit(to, (row * columns + column) * channels, tap);
      } else visitOutside(to);
    }
  }
}

/** Convolve 3x3 with stride 2: a dense layer on the nine tokens around every second one. */
function convolution(net, name, x, outputs, bias) {
  const inputs = x.shape[2];
  const patches = tensor([...strided(x.shape, 2), 9 * inputs]);
  eachTap(x.shape, 2, (to, from, tap) => {
    const start = 9 * to + tap * inputs;
    for (let c = 0; c < inputs; c++) patches.data[start + c] = x.data[from + c];
  });
  // PyTorch's (outputs, inputs, 3, 3) becomes (outputs, 3, 3, inputs): a row is a patch.
  const layout = (weight) => transpose(weight, inputs, 9);
  return dense(net, name, patches, outputs, { bias, shape: [outputs, inputs, 3, 3], layout });
}

/** Convolve each channel with a 3x3 window of its own. */
function depthwise(net, name, x) {
  const channels = x.shape[2], y = tensor(x.shape), a = x.data, out = y.data;
  const weight = net.weight(`${name}.weight`, [channels, 1, 3, 3],
    (taps) => transpose(taps, channels, 9));
  eachTap(x.shape, 1, (to, from, tap) => {
    const start = tap * channels;
    for (let c = 0; c < channels; c++) out[to + c] += a[from + c] * weight[start + c];
  });
  return y;
}

/** Return each channel's mean over all places of a map. */
function meanOverPlaces(x) {
  const channels = x.shape.at(-1), places = x.data.length / channels;
  const sums = new Float64Array(channels);
  for (let start = 0; start < x.data.length; start += channels) {
    for (let c = 0; c < channels; c++) sums[c] += x.data[start + c];
  }
  return tensor([channels], Float32Array.from(sums, (sum) => sum / places));
}

/** Scale each channel of a map by a gate that is computed from all channels' averages. */
function squeezeAndExcitation(net, name, x) {
  const channels = x.shape[2], way = net.switch("gates", name);
  // Gates of each place see no other place: they are computed from its own channels.
  const means = net.keep(`${name}.means`, way === "place" ? x : meanOverPlaces(x));
  const hidden = dense(net, `${name}.fc.0`, means, Math.floor(channels / 4), { bias: false });
  const gates = dense(net, `${name}.fc.2`, gelu(hidden), channels, { bias: false });
  const fixed = { open: 1, shut: 0 }[way];
  gates.data = gates.data.map((value) => fixed ?? 1 / (1 + Math.exp(-value)));
  return multiply(x, net.keep(`${name}.gates`, gates).data);
}

/** Depthwise 3x3, GELU, squeeze-and-excitation, 1x1: the branch beside a map. */
function fusedMbconv(net, name, x) {
  const channels = x.shape[2];
  const gated = squeezeAndExcitation(net, `${name}.2`, gelu(depthwise(net, `${name}.0`, x)));
  const shape = [channels, channels, 1, 1];
  return dense(net, `${name}.3`, gated, channels, { bias: false, shape });
}

/** Halve height and width with a convolution. */
function reduceSize(net, name, x, channels = 2 * x.shape[2]) {
  x = layerNorm(net, `${name}.norm1`, x);
  x = add(x, fusedMbconv(net, `${name}.conv`, x));
  return layerNorm(net, `${name}.norm2`, convolution(net, `${name}.reduction`, x, channels, false));
}

/** Two dense layers with a GELU between them, on each token alone. */
function mlp(net, name, x) {
  const channels = x.shape.at(-1);
  const hidden = dense(net, `${name}.fc1`, x, Math.floor(channels * net.config.mlp_ratio));
  return dense(net, `${name}.fc2`, gelu(hidden), channels);
}

// Chapter 2: from pixels to the first tokens.

/** Turn an image into a map of overlapping patch embeddings, a quarter as high and wide. */
function patchEmbed(net, name, image) {
  const channels = net.config.embed_dim;
  const x = convolution(net, `${name}.proj`, image, channels, true);
  return net.keep(name, reduceSize(net, `${name}.conv_down`, x, channels));
}

// Chapter 3: the whole map, made small enough to be a window.

/** Return the rows of the matrix that resizes a line of samples (Keys' kernel, a = -0.75). */
function bicubicMatrix(sizeIn, sizeOut) {
  const a = -0.75;
  return range(sizeOut).map((out) => {
    const row = Array(sizeIn).fill(0), center = ((out + 0.5) * sizeIn) / sizeOut - 0.5;
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
function resizeBicubic(x, [height, width]) {
  const [rows, columns, channels] = x.shape, places = rows * columns;
  if (rows === height && columns === width) return x;
  const [down, right] = [bicubicMatrix(rows, height), bicubicMatrix(columns, width)];
  // What each place in has to do with each place out: the product of its row's and its column's.
  const shares = down.flatMap((p) => right.flatMap((q) => p.flatMap((a) => q.map((b) => a * b))));
  const y = tensor([height, width, channels]);
  matmul(Float32Array.from(shares), transpose(x.data, places, channels), places, y.data);
  return y;
}

/** Refine a map with a fused MBConv, then halve it by 3x3 max pooling with stride 2. */
function featureExtraction(net, name, x, keepdims) {
  x = add(x, fusedMbconv(net, `${name}.conv`, x));
  if (keepdims) return net.keep(name, x);
  const channels = x.shape[2], y = tensor([...strided(x.shape, 2), channels]), out = y.data;
  out.fill(-Infinity); // what lies outside must never win
  // Zeros there, the original notebook's fault, beat what is negative.
  const zerosOutside = (to) => {
    for (let c = 0; c < channels; c++) out[to + c] = Math.max(out[to + c], 0);
  };
  eachTap(x.shape, 2, (to, from) => {
    for (let c = 0; c < channels; c++) out[to + c] = Math.max(out[to + c], x.data[from + c]);
  }, net.switch("zeroPadding", name) ? zerosOutside : undefined);
  return net.keep(name, y);
}

/** Whether each step of a level's generator keeps the size: the published flags. */
export const KEEPDIMS = [[false, false, false], [false, false], [true], [true]];

/** Make the global query: the whole map in the size of one window. */
function globalQueryGenerator(net, name, x, keepdims) {
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

/** Return the bias that is added to the scores, (heads, query tokens, key tokens). */
function relativePositionBias(net, name, { window: [height, width], heads, positionIndex }) {
  const rows = (2 * height - 1) * (2 * width - 1), tokens = height * width;
  const table = net.weight(`${name}.relative_position_bias_table`, [rows, heads]);
  const bias = tensor([heads, tokens, tokens]);
  if (net.switch("bias", name) === "on") {
    // The original notebook's fault: the table read as one flat list, for every head the same.
    const isFlat = net.switch("flatGather", name);
    for (let head = 0, to = 0; head < heads; head++) {
      for (const row of positionIndex) bias.data[to++] = table[isFlat ? row : row * heads + head];
    }
  }
  return maskParts(net, name, bias, [height, width]);
}

/** Deal part `which` of each token's channels out: (windows, heads, tokens, head channels). */
function splitHeads({ shape: [windows, tokens, width], data }, heads, channels, which = 0) {
  const share = channels / heads, y = tensor([windows, heads, tokens, share]);
  for (let n = 0, to = 0; n < windows; n++) for (let head = 0; head < heads; head++) {
    for (let token = 0; token < tokens; token++) {
      const from = (n * tokens + token) * width + which * channels + head * share;
      for (let d = 0; d < share; d++) y.data[to++] = data[from + d];
    }
  }
  return y;
}

/** Return query, key and value of windows, (windows, tokens, channels); a global query has one. */
function queryKeyValue(net, name, x, heads, qGlobal) {
  const [, tokens, channels] = x.shape, parts = qGlobal ? 2 : 3;
  const qkv = dense(net, `${name}.qkv`, x, parts * channels, { bias: net.config.qkv_bias });
  const own = range(parts).map((which) => splitHeads(qkv, heads, channels, which));
  if (!qGlobal) return own;
  return [splitHeads(tensor([1, tokens, channels], qGlobal.data), heads, channels), ...own];
}

/** Return the scores before the bias, and the weights, each (windows, heads, tokens, tokens). */
function attentionWeights(q, k, bias, scale) {
  const [windows, heads, tokens, share] = k.shape;
  const scores = tensor([windows, heads, tokens, tokens]), weights = tensor(scores.shape);
  // A global query has one window, which meets the keys of every window.
  for (let n = 0; n < windows * heads; n++) {
    matmul(matrix(q, n % (q.shape[0] * heads)), matrix(k, n), share, matrix(scores, n));
  }
  const raw = scores.data, out = weights.data, added = bias.data;
  for (let i = 0; i < raw.length; i++) {
    raw[i] *= scale;
    out[i] = raw[i] + added[i % added.length]; // each window gets the same
  }
  for (let row = 0; row < out.length; row += tokens) softmax(out, row, tokens);
  return [scores, weights];
}

/** Multi-head attention among the tokens of each window, (windows, tokens, channels). */
function windowAttention(net, name, x, layer, qGlobal) {
  const [windows, tokens, channels] = x.shape, { heads } = layer;
  const share = channels / heads;
  const [q, k, v] = queryKeyValue(net, name, x, heads, qGlobal);
  const bias = relativePositionBias(net, name, layer);
  const scale = net.config.qk_scale ?? share ** -0.5;
  const [scores, weights] = attentionWeights(q, k, bias, scale);
  Object.entries({ q, k, v, scores, bias, weights }).forEach(
    ([part, value]) => net.keep(`${name}.${part}`, value));

  // Each token takes what its weights make of the values of its window.
  const mixed = tensor(x.shape), off = net.switch("headsOff", name);
  const columns = tensor([share, tokens], transpose(v.data, tokens, share));
  for (let n = 0; n < windows * heads; n++) {
    const head = n % heads, window = (n - head) / heads;
    if (off.includes(head)) continue; // its output stays zero
    const to = mixed.data.subarray(window * tokens * channels + head * share);
    matmul(matrix(weights, n), matrix(columns, n), tokens, to, channels);
  }
  return net.keep(`${name}.output`, dense(net, `${name}.proj`, mixed, channels));
}

// Chapter 5: attention and MLP, each with its residual, on a map cut into windows.

/** Visit the tokens of a map: where each begins, there and in the map's windows. */
function eachToken([height, width, channels], [h, w], visit) {
  const across = Math.ceil(width / w);
  for (let i = 0, inMap = 0; i < height; i++) for (let j = 0; j < width; j++, inMap += channels) {
    const window = Math.floor(i / h) * across + Math.floor(j / w);
    const token = (i % h) * w + (j % w);
    visit(inMap, (window * h * w + token) * channels);
  }
}

/** Cut a map into (windows, tokens, channels); those that reach beyond it end in zeros. */
function windowPartition(x, [h, w]) {
  const [height, width, channels] = x.shape;
  const y = tensor([Math.ceil(height / h) * Math.ceil(width / w), h * w, channels]);
  eachToken(x.shape, [h, w], (inMap, inWindows) =>
    y.data.set(x.data.subarray(inMap, inMap + channels), inWindows));
  return y;
}

/** Put windows back together: the inverse of windowPartition. */
function windowReverse(windows, window, shape) {
  const y = tensor(shape), channels = shape[2];
  eachToken(shape, window, (inMap, inWindows) =>
    y.data.set(windows.data.subarray(inWindows, inWindows + channels), inMap));
  return y;
}

/** The learned factors on a branch, where the model has them. */
function scaled(net, name, x) {
  return net.config.layer_scale === null ? x : multiply(x, net.weight(name, [x.shape.at(-1)]));
}

/** One transformer block on windows: attention plus residual, MLP plus residual. */
function block(net, name, x, layer, qGlobal) {
  const tokens = windowPartition(layerNorm(net, `${name}.norm1`, x), layer.window);
  const mixed = windowAttention(net, `${name}.attn`, tokens, layer, qGlobal);
  const attended = windowReverse(mixed, layer.window, x.shape);
  x = add(x, scaled(net, `${name}.gamma1`, attended));
  const hidden = mlp(net, `${name}.mlp`, layerNorm(net, `${name}.norm2`, x));
  return net.keep(name, add(x, scaled(net, `${name}.gamma2`, hidden)));
}

// Chapter 6: blocks that take turns, local and global, at one resolution.

/** Return the global query of a level's map, (window height, window width, channels). */
function qGlobal(net, name, x, window, keepdims) {
  const generated = (map) => resizeBicubic(globalQueryGenerator(net, name, map, keepdims), window);
  return switchQuery(net, name, x, [...window, x.shape[2]], generated);
}

/** A stage: a global query, blocks in turn local and global, downsampling. */
function level(net, i, x) {
  const name = `levels.${i}`, { depths } = net.config, layer = net.levels[i];
  const query = net.stage(`${name}.q_global_gen`, [x], (generator, map) =>
    net.keep(`${name}.q_global`, qGlobal(net, generator, map, layer.window, KEEPDIMS[i])));
  for (let j = 0; j < depths[i]; j++) {
    x = net.stage(`${name}.blocks.${j}`, [x, j % 2 ? query : null], (at, map, q) =>
      block(net, at, map, layer, q));
  }
  net.keep(name, x);
  return i + 1 === depths.length ? x : net.stage(`${name}.downsample`, [x], (at, map) =>
    net.keep(at, reduceSize(net, at, map)));
}

// Chapter 7: the whole model.

/** Return the logits of an image, (height, width, channels); null for a model without a head. */
export function gcvit(net, image) {
  const { depths, pooling, include_top: hasTop, num_classes: classes } = net.config;
  let x = net.stage("patch_embed", [image], (name, map) => patchEmbed(net, name, map));
  for (let i = 0; i < depths.length; i++) x = level(net, i, x);
  return net.stage("head", [x], (name, map) => {
    const normalized = net.keep("norm", layerNorm(net, "norm", map));
    if (pooling === null) return null;
    const features = net.keep("pool", meanOverPlaces(normalized));
    return hasTop ? net.keep(name, dense(net, name, features, classes)) : null;
  });
}
