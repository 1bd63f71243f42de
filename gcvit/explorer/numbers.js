/** The numbers behind the page's panels. In the worker, this text stands behind worker.js. */

const DIRECTIONS = 3; // red, green, blue
const ROUNDS = 60; // of the power iteration: what is shown are bytes

/** A map's values for a picture: the root mean square of each place's channels. */
function lengths({ shape: [rows, columns, channels], data }) {
  const values = new Float32Array(rows * columns);
  for (let i = 0; i < data.length; i++) values[Math.floor(i / channels)] += data[i] ** 2;
  return { rows, columns, values: values.map((sum) => Math.sqrt(sum / channels)) };
}

/** One channel of a map; a map with fewer channels begins anew. */
function channelOf({ shape: [rows, columns, channels], data }, channel) {
  const start = channel % channels;
  const values = Float32Array.from(range(rows * columns), (i) => data[i * channels + start]);
  return { rows, columns, values, channel: start };
}

const dot = (one, other) => one.reduce((sum, value, i) => sum + value * other[i], 0);

/** Return the directions in which a map's channels vary most, each of length 1. */
function mainDirections(covariance, channels) {
  const directions = range(Math.min(DIRECTIONS, channels)).map((which) =>
    Float64Array.from(range(channels), (i) => Math.cos((which + 1) * (i + 1))),
  );
  for (const _ of range(ROUNDS)) {
    directions.forEach((direction, which) => {
      const turned = range(channels).map((i) =>
        dot(direction, covariance.subarray(i * channels, (i + 1) * channels)),
      );
      for (const before of directions.slice(0, which)) {
        const share = dot(turned, before);
        before.forEach((value, i) => (turned[i] -= share * value));
      }
      const length = Math.sqrt(dot(turned, turned)) || 1;
      direction.set(turned.map((value) => value / length));
    });
  }
  // A direction has no sign of its own: its largest part is made positive.
  for (const direction of directions) {
    const most = direction.reduce((best, x) => (Math.abs(x) > Math.abs(best) ? x : best), 0);
    if (most < 0) direction.forEach((value, i) => (direction[i] = -value));
  }
  return directions;
}

/** A map's three main directions (principal components) as red, green and blue, 0 to 255. */
function directionColors({ shape: [rows, columns, channels], data }) {
  const places = rows * columns;
  const means = meanOverPlaces({ shape: [rows, columns, channels], data }).data;
  const centered = data.map((value, i) => value - means[i % channels]);
  const covariance = new Float64Array(channels * channels);
  for (let at = 0; at < centered.length; at += channels) {
    for (let i = 0; i < channels; i++) {
      for (let j = 0; j < channels; j++) {
        covariance[i * channels + j] += (centered[at + i] * centered[at + j]) / places;
      }
    }
  }
  const colors = new Uint8ClampedArray(places * 3);
  mainDirections(covariance, channels).forEach((direction, which) => {
    const along = range(places).map((n) =>
      dot(direction, centered.subarray(n * channels, (n + 1) * channels)),
    );
    const [least, most] = [Math.min(...along), Math.max(...along)];
    along.forEach((x, n) => (colors[3 * n + which] = (255 * (x - least)) / (most - least || 1)));
  });
  return { rows, columns, colors };
}

Object.assign(questions, {
  /** Return the maps that leave the levels, and a level's way to its global query, as pictures. */
  maps({ level, as, channel }) {
    const { tensors } = result;
    const shownAs = { length: lengths, directions: directionColors, channel: channelOf }[as];
    const picture = (name) => ({ name, ...shownAs(tensors[name], channel) });
    const steps = Object.keys(tensors).filter((name) =>
      name.match(/^levels\.(\d+)\.q_global_gen\.to_q_global\.\d+$/)?.[1] === String(level));
    const input = level ? `levels.${level - 1}.downsample` : "patch_embed";
    return {
      levels: model.config.depths.map((_, i) => picture(`levels.${i}`)),
      generator: [input, ...steps, `levels.${level}.q_global`].map(picture),
      channels: model.config.embed_dim * 2 ** (model.config.depths.length - 1),
    };
  },

  /** Return the arithmetic of all weights of one query token of one head, a line for each key. */
  cells({ level, block, head, row, column }) {
    const layer = layerOf(level, block);
    const { at, query } = placeIn(layer, row, column);
    const weights = rowOf(layer, at, head, query);
    const strongest = weights.indexOf(Math.max(...weights));
    // The mean is no head: of the key that it weighs most, the head that does so most.
    const shares = range(layer.heads).map((one) => rowOf(layer, at, one, query)[strongest]);
    const chosen = head < 0 ? shares.indexOf(Math.max(...shares)) : head;
    const v = result.tensors[`${layer.name}.attn.v`];
    const [, , tokens, share] = v.shape;
    const tableRows = relativePositionIndex(layer.window).slice(query * tokens);
    const lines = range(tokens).map((key) => {
      const start = ((at * layer.heads + chosen) * tokens + key) * share;
      const line = explainWeight(model, result.tensors, layer.name, {
        window: at, head: chosen, query, key,
      });
      const value = v.data.slice(start, start + share);
      const weighted = value.map((x) => x * line.weight);
      return { ...line, value, weighted, tableRow: tableRows[key] };
    });
    const mixed = range(share).map((d) =>
      lines.reduce((sum, { weighted }) => sum + weighted[d], 0));
    return { head: chosen, strongest, query, lines, mixed };
  },

  /** Return the arithmetic of one channel's gate, at a place (down, right) where it has places. */
  gate({ layer: name, channel, place: [y, x] }) {
    const base = name.replace(/\.gates$/, "");
    const [means, gates] = [result.tensors[`${base}.means`], result.tensors[name]];
    const channels = means.shape.at(-1);
    const startIn = ({ shape }) => shape.length === 1 ? 0
      : (Math.floor(y * shape[0]) * shape[1] + Math.floor(x * shape[1])) * channels;
    const averages = means.data.slice(startIn(means), startIn(means) + channels);
    const [first, second] = [0, 2].map((layer) => model.weights[`${base}.fc.${layer}.weight`]);
    const squeezed = tensor([channels], averages);
    const sums = dense(model, `${base}.fc.0`, squeezed, first.shape[0], { bias: false }).data;
    const hidden = gelu(tensor([sums.length], sums.slice())).data;
    const weights = second.data.slice(channel * hidden.length, (channel + 1) * hidden.length);
    const sum = dot(hidden, weights);
    return {
      averages, sums, hidden, weights, sum,
      products: hidden.map((value, i) => value * weights[i]),
      computed: 1 / (1 + Math.exp(-sum)),
      used: gates.data[startIn(gates) + channel],
    };
  },

  /** Return where the query tokens of the first level with a single window look, on average. */
  looks() {
    const { depths } = model.config;
    const levels = range(depths.length).filter((i) => depths[i] > 1);
    const single = levels.find((i) => size(layerOf(i, 0).windows) === 1) ?? levels.at(-1);
    if (single === undefined) return null;
    const layer = layerOf(single, depths[single] - 1 - (depths[single] % 2));
    const tokens = size(layer.window);
    const average = (n) => {
      const rows = range(tokens).map((query) => rowOf(layer, n, -1, query));
      return range(tokens).map((key) => rows.reduce((sum, row) => sum + row[key] / tokens, 0));
    };
    const { rows, columns } = layer;
    return { level: single, rows, columns, values: onMap(layer, average) };
  },
});
