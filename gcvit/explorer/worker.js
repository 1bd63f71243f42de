/**
 * What the page asks of the model. In the worker, this text stands behind those of the modules.
 *
 * A question is { id, name, ...arguments }; the answer has the same id, and what the function of
 * that name in `questions` returned, or the message of its error.
 */

let model, photo, result, trained, otherQueries;

/** Return the part of the model that a level's block is, for an image of the present size. */
function layerOf(level, block) {
  const name = `levels.${level}.blocks.${block}`;
  const [rows, columns] = result.tensors[name].shape;
  const window = pair(model.config.window_size[level]);
  const windows = [Math.ceil(rows / window[0]), Math.ceil(columns / window[1])];
  return { name, rows, columns, window, windows, heads: model.config.num_heads[level] };
}

/** Return the window that a token is in, and its place in that window, each as one number. */
function placeIn({ window: [h, w], windows }, row, column) {
  const at = Math.floor(row / h) * windows[1] + Math.floor(column / w);
  return { at, query: (row % h) * w + (column % w) };
}

/** Return the weights of a query token over the keys of one window, the mean if head is -1. */
function rowOf({ name, heads, window }, at, head, query) {
  const { data } = result.tensors[`${name}.attn.weights`];
  const tokens = size(window);
  const chosen = head < 0 ? range(heads) : [head];
  const row = new Float32Array(tokens);
  for (const one of chosen) {
    const start = ((at * heads + one) * tokens + query) * tokens;
    for (let key = 0; key < tokens; key++) row[key] += data[start + key] / chosen.length;
  }
  return row;
}

/** Lay the rows of all windows, which a function returns, out on the map. */
function onMap({ rows, columns, window: [h, w], windows }, rowOfWindow) {
  const values = new Float32Array(rows * columns);
  for (const n of range(size(windows))) {
    rowOfWindow(n).forEach((weight, key) => {
      const i = Math.floor(n / windows[1]) * h + Math.floor(key / w);
      const j = (n % windows[1]) * w + (key % w);
      // A window that was padded reaches beyond the map.
      if (i < rows && j < columns) values[i * columns + j] = weight;
    });
  }
  return values;
}

/** Return a photograph as a model takes it; one of a single channel takes its shades of gray. */
function asTaken({ pixels, height, width }, taker) {
  const taken = prepare(pixels, height, width, taker);
  if (taker.config.in_channels === 3) return taken;
  const [mean, std] = [taker.mean[0], taker.std[0]];
  taken.image = Float32Array.from(range(taken.height * taken.width), (i) => {
    const [red, green, blue] = taken.pixels.subarray(3 * i, 3 * i + 3);
    // The whole-numbered weights of Pillow's conversion to gray.
    const gray = (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16;
    taken.pixels.fill(gray, 3 * i, 3 * i + 3);
    return (gray - mean) / std;
  });
  return taken;
}

async function pass(switches) {
  result = await model.run(photo.image, photo.height, photo.width, { switches });
  const { logits, computed } = result;
  return { logits, probabilities: softmax(Array.from(logits)), computed };
}

/** Return the global query of each level, by the level's name. */
function queriesOf({ tensors }) {
  const names = range(model.config.depths.length).map((i) => `levels.${i}`);
  return Object.fromEntries(names.map((name) => [name, tensors[`${name}.q_global`]]));
}

const questions = {
  /** Make a model of the bytes of a checkpoint; if that fails, the one before stays. */
  load({ buffer, imageSize }) {
    const next = createModel(readSafetensors(buffer));
    const { depths, num_heads: heads, in_channels: channels, num_classes: count } = next.config;
    next.imageSize = imageSize ?? next.imageSize;
    if (!next.imageSize) throw new Error("Its header does not say how large its images are.");
    if (!next.laidOut.has("head.weight")) throw new Error("It has no head, so it names no class.");
    if (channels !== 1 && channels !== 3) {
      throw new Error(`It takes images of ${channels} channels; a photograph has 3, or 1 of gray.`);
    }
    [model, photo, result, trained, otherQueries] = [next];
    const windows = model.config.window_size.map(pair);
    return {
      levels: depths.map((depth, i) => ({ depth, heads: heads[i], window: windows[i] })),
      classes: range(count).map((i) => model.classes?.[i] ?? `class ${i}`),
      parts: windows[0],
      imageSize: pair(model.imageSize),
    };
  },

  /** Take the bytes of a photograph of any size; return what the model sees of it. */
  photograph(given) {
    photo = asTaken(given, model);
    otherQueries = trained?.queries;
    trained = null;
    return { pixels: photo.pixels, height: photo.height, width: photo.width };
  },

  /** Run the model with some switches, and tell what a page shows at once. */
  async run({ switches }) {
    const started = performance.now();
    const first = trained ? [] : (trained = await pass({})).computed;
    trained.queries ??= queriesOf(result);
    const other = switches.query === "other" && { query: otherQueries };
    const now = await pass({ ...switches, ...other });
    const gates = Object.keys(result.tensors).filter((name) => name.endsWith(".gates"));
    return {
      now,
      trained: { logits: trained.logits, probabilities: trained.probabilities },
      levels: model.config.depths.map((_, i) => layerOf(i, 0)),
      gates: gates.map((name) => {
        const values = result.tensors[name];
        const [least, most] = ["min", "max"].map((which) =>
          values.data.reduce((one, other) => Math[which](one, other)));
        const places = values.shape.length > 1;
        return { name, places, least, most, means: meanOverPlaces(values).data };
      }),
      hasOther: Boolean(otherQueries),
      computed: new Set([...first, ...now.computed]).size,
      steps: model.steps.length,
      milliseconds: performance.now() - started,
    };
  },

  /** Return what the token at (row, column) of a level attends to, locally and globally. */
  attention({ level, row, column, blocks: [local, global], heads: [localHead, globalHead] }) {
    const own = layerOf(level, local);
    const { at, query } = placeIn(own, row, column);
    const answer = { local: rowOf(own, at, localHead, query) };
    if (global >= 0) {
      const every = layerOf(level, global);
      answer.global = onMap(every, (n) => rowOf(every, n, globalHead, query));
    }
    return answer;
  },

  /** Return what each place of the last map adds to the logit of a class. */
  activation({ label }) {
    const {
      shape: [rows, columns],
      data,
    } = classActivation(model, result.tensors, label);
    return { rows, columns, values: data };
  },
};

self.onmessage = async ({ data: { id, name, ...given } }) => {
  try {
    self.postMessage({ id, answer: await questions[name](given) });
  } catch (error) {
    self.postMessage({ id, error: error.message });
  }
};
