/**
 * What the page asks of the model. In the worker, this text stands behind those of the modules.
 *
 * A question is { id, name, ...arguments }; the answer has the same id, and what the function of
 * that name in `questions` returned, or the message of its error.
 */

let model, photo, result, ownQueries, otherQueries;

/** A map's values for a picture: the root mean square of each place's channels. */
function lengths({ shape: [rows, columns, channels], data }) {
  const values = new Float32Array(rows * columns);
  for (let i = 0; i < data.length; i++) values[Math.floor(i / channels)] += data[i] ** 2;
  return { rows, columns, values: values.map((sum) => Math.sqrt(sum / channels)) };
}

function layerOf(level, block) {
  const name = `levels.${level}.blocks.${block}`;
  const [rows, columns] = result.tensors[name].shape;
  const window = pair(model.config.window_size[level]);
  const windows = [Math.ceil(rows / window[0]), Math.ceil(columns / window[1])];
  return { name, rows, columns, window, windows, heads: model.config.num_heads[level] };
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

const questions = {
  /** Make a model of the bytes of a checkpoint. */
  load({ buffer, imageSize }) {
    model = createModel(readSafetensors(buffer));
    model.imageSize = imageSize;
    const { depths, num_heads: heads } = model.config;
    const windows = model.config.window_size.map(pair);
    const levels = depths.map((depth, i) => ({ depth, heads: heads[i], window: windows[i] }));
    return { levels, classes: model.classes, parts: windows[0] };
  },

  /** Take the bytes of a photograph of any size; return what the model sees of it. */
  photograph({ pixels, height, width }) {
    photo = prepare(pixels, height, width, model);
    otherQueries = ownQueries;
    return { pixels: photo.pixels, height: photo.height, width: photo.width };
  },

  /** Run the model with some switches, and tell what a page shows at once. */
  run({ switches }) {
    const started = performance.now();
    const query = switches.query === "other" ? otherQueries : switches.query;
    result = model.run(photo.image, photo.height, photo.width, {
      switches: { ...switches, query },
    });
    const { logits, tensors } = result;
    if (switches.query === "own") {
      ownQueries = Object.fromEntries(
        range(model.config.depths.length).map((i) => [
          `levels.${i}`,
          tensors[`levels.${i}.q_global`],
        ]),
      );
    }
    const probabilities = softmax(logits);
    const best = range(logits.length).sort((a, b) => probabilities[b] - probabilities[a]);
    const answers = best.slice(0, 5).map((label) => ({
      label,
      name: model.classes?.[label] ?? `class ${label}`,
      probability: probabilities[label],
    }));
    const levels = model.config.depths.map((depth, i) => {
      const generator = `levels.${i}.q_global_gen.to_q_global.`;
      const steps = Object.keys(tensors).filter((name) => name.startsWith(generator));
      return {
        ...layerOf(i, 0),
        map: lengths(tensors[`levels.${i}`]),
        steps: steps
          .filter((name) => !name.endsWith("gates"))
          .map((name) => lengths(tensors[name])),
        query: lengths(tensors[`levels.${i}.q_global`]),
      };
    });
    const gates = Object.keys(tensors)
      .filter((name) => name.endsWith(".gates"))
      .map((name) => ({
        name,
        values: tensors[name].data,
        places: tensors[name].shape.length > 1,
      }));
    return {
      answers,
      levels,
      gates,
      hasOther: Boolean(otherQueries),
      computed: result.computed.length,
      steps: model.steps.length,
      milliseconds: performance.now() - started,
    };
  },

  /** Return what the token at (row, column) of a level attends to, locally and globally. */
  attention({ level, row, column, blocks: [local, global], heads: [localHead, globalHead] }) {
    const [own, every] = [layerOf(level, local), global < 0 ? null : layerOf(level, global)];
    const [h, w] = own.window;
    const at = Math.floor(row / h) * own.windows[1] + Math.floor(column / w);
    const query = (row % h) * w + (column % w);
    const answer = { window: [Math.floor(row / h), Math.floor(column / w)], query };
    answer.local = rowOf(own, at, localHead, query);
    if (every) {
      answer.global = new Float32Array(own.rows * own.columns);
      for (const n of range(size(own.windows))) {
        rowOf(every, n, globalHead, query).forEach((weight, key) => {
          const i = Math.floor(n / own.windows[1]) * h + Math.floor(key / w);
          const j = (n % own.windows[1]) * w + (key % w);
          // A window that was padded reaches beyond the map.
          if (i < own.rows && j < own.columns) answer.global[i * own.columns + j] = weight;
        });
      }
    }
    const arithmetic = (layer, values, head) => {
      const best = values.indexOf(Math.max(...values));
      // The mean is no head: of the key that it weighs most, the head that does so most.
      const shares = range(layer.heads).map((one) => rowOf(layer, at, one, query)[best]);
      const strongest = head < 0 ? shares.indexOf(Math.max(...shares)) : head;
      const chosen = { window: at, head: strongest, query, key: best };
      return {
        key: best,
        head: chosen.head,
        ...explainWeight(model, result.tensors, layer.name, chosen),
      };
    };
    answer.arithmetic = [arithmetic(own, answer.local, localHead)];
    if (every)
      answer.arithmetic.push(arithmetic(every, rowOf(every, at, globalHead, query), globalHead));
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

self.onmessage = ({ data: { id, name, ...given } }) => {
  try {
    self.postMessage({ id, answer: questions[name](given) });
  } catch (error) {
    self.postMessage({ id, error: error.message });
  }
};
