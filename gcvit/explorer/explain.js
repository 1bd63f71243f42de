/** What a page shows of a run besides its tensors. */

import { range, tensor } from "./tensors.js";

/** Return what each place of the last map adds to the logit of a class, (height, width). */
export function classActivation(model, { norm }, label) {
  const channels = norm.shape[2];
  const weight = model.laidOut.get("head.weight").subarray(label * channels);
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
