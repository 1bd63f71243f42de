/** What switches put in the place of a part of the model: chapter 9's laboratory, in the page. */

import { pair, range, tensor } from "./tensors.js";

/** Return what keeps the parts of a window apart, (tokens, tokens): 0 within a part, or -1e9. */
function blockMask([height, width], [h, w]) {
  const part = range(height * width).map((token) =>
    Math.floor(token / width / h) * width + Math.floor((token % width) / w));
  return part.flatMap((one) => part.map((other) => (one === other ? 0 : -1e9)));
}

/** Return a bias, (heads, query tokens, key tokens), that keeps apart what is switched so. */
export function maskParts(net, name, bias, window) {
  const part = net.switch("part", name);
  if (part === "whole") return bias;
  const mask = blockMask(window, pair(part));
  return tensor(bias.shape, bias.data.map((value, i) => value + mask[i % mask.length]));
}

/** Return the global query, (window height, window width, channels), that is switched to. */
export function switchQuery(net, name, x, shape, generated) {
  const way = net.switch("query", name);
  if (way === "own") return generated(x);
  if (way === "zero") return tensor(shape);
  // A map of ones gives a query that was learned, but is the same for every image.
  if (way === "constant") return generated(tensor(x.shape, x.data.map(() => 1)));
  if (String(way.shape) === String(shape)) return way;
  throw new Error(`The query of ${name} has the shape ${shape}; got one of ${way.shape}.`);
}
