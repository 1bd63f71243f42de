/** From the pixels of a photograph to what a model takes. */

import { pair, range } from "./tensors.js";

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
