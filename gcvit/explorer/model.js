/** What the functions of engine.js share: the weights, the switches, what was computed before. */

import { gcvit, KEEPDIMS, relativePositionIndex } from "./engine.js";
import { pair, size, tensor } from "./tensors.js";

const DEFAULTS = {
  in_channels: 3, mlp_ratio: 3, qkv_bias: true, qk_scale: null, layer_scale: null,
  include_top: true, pooling: "avg", num_classes: 1000,
};
const SMALLEST_IMAGE = 32;

/** What the switches may be: values, the first of them as trained, and types. */
const SWITCHES = {
  query: ["own", "constant", "zero", "object"],
  gates: ["own", "place", "open", "shut"],
  part: ["whole", "number", "object"],
  headsOff: ["none", "object"],
  bias: ["on", "off"],
  flatGather: [false, true],
  zeroPadding: [false, true],
};

const isByName = (value) => value?.constructor === Object && !value.data;
const isWithin = (name, part) => name === part || name.startsWith(`${part}.`);

class Model {
  constructor({ tensors, metadata }, config) {
    const written = (name) => (metadata[name] === undefined ? null : JSON.parse(metadata[name]));
    this.config = { ...DEFAULTS, ...(config ?? written("config")) };
    const { window_size: windows, depths, num_heads: heads, in_channels: channels } = this.config;
    const levels = depths?.length;
    if (!KEEPDIMS[levels - 1] || windows?.length !== levels || heads?.length !== levels) {
      throw new Error("A config has window_size, depths and num_heads, for each of 1 to "
        + `${KEEPDIMS.length} levels; got ${JSON.stringify({ windows, depths, heads })}.`);
    }
    this.levels = windows.map(pair).map((window, i) => (
      { window, heads: heads[i], positionIndex: relativePositionIndex(window) }));
    this.classes = written("classes");
    this.imageSize = written("image_size");
    this.crop = written("crop") ?? 1;
    this.mean = written("mean") ?? [123.675, 116.28, 103.53];
    this.std = written("std") ?? [58.395, 57.12, 57.375];
    Object.assign(this, { weights: tensors, laidOut: new Map(), stages: new Map(), parts: [] });
    // A pass over an empty image finds, checks and lays out every weight.
    this.run(new Float32Array(SMALLEST_IMAGE ** 2 * channels), SMALLEST_IMAGE, SMALLEST_IMAGE);
    this.steps = [...this.stages.keys()];
    this.parts = [...this.stages.values()].flatMap(({ settings }) => settings);
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
   * Returns logits, tensors by name, and the names of the steps that were computed: of the same
   * image, those that a switch changes. Do not write into the tensors, which the model keeps.
   */
  run(image, height, width, { switches = {}, keep = ["*"] } = {}) {
    const shape = [height, width, this.config.in_channels];
    if (image.length !== size(shape) || Math.min(height, width) < SMALLEST_IMAGE) {
      throw new Error(`An image has height x width x ${shape[2]} values and sides of at least `
        + `${SMALLEST_IMAGE} px; got ${image.length} values for ${height} x ${width} px.`);
    }
    this.checkSwitches(switches);
    if (String(keep) !== this.kept) this.stages.clear();
    const isSame = String(this.image?.shape) === String(shape)
      && image.every((value, i) => value === this.image.data[i]);
    if (!isSame) this.image = tensor(shape, Float32Array.from(image));
    const escaped = keep.map((name) => name.replace(/[.+?^${}()|[\]\\]/g, "\\$&"));
    const patterns = escaped.map((name) => new RegExp(`^${name.replaceAll("*", ".*")}$`));
    Object.assign(this, { switches, patterns, kept: String(keep) });
    Object.assign(this, { tensors: {}, settings: [], computed: [] });
    const logits = gcvit(this, this.image)?.data ?? null;
    return { logits, tensors: this.tensors, computed: this.computed };
  }

  checkSwitches(switches) {
    for (const [kind, value] of Object.entries(switches)) {
      if (!SWITCHES[kind]) {
        throw new Error(`The switches are ${Object.keys(SWITCHES).join(", ")}; got ${kind}.`);
      }
      for (const part of isByName(value) ? Object.keys(value) : []) {
        if (!this.parts.some(([of, name]) => of === kind && isWithin(name, part))) {
          throw new Error(`The model has no part ${part}, for which ${kind} is switched.`);
        }
      }
    }
  }

  /** Return compute(name, ...inputs): what it was, if inputs and all switches met are the same. */
  stage(name, inputs, compute) {
    let last = this.stages.get(name);
    const isSame = last?.inputs.every((x, i) => x === inputs[i])
      && last.settings.every(([kind, part, way]) => way === JSON.stringify(this.wayOf(kind, part)));
    const { tensors } = this;
    if (!isSame) {
      Object.assign(this, { tensors: {}, settings: [] });
      const output = compute(name, ...inputs);
      last = { inputs, output, tensors: this.tensors, settings: this.settings };
      this.stages.set(name, last);
      this.computed.push(name);
    }
    this.tensors = Object.assign(tensors, last.tensors);
    return last.output;
  }

  /** Return a weight that must have a shape. A layout is applied once and remembered. */
  weight(name, shape, layout = (data) => data) {
    if (!this.laidOut.has(name)) {
      const { shape: given, data } = this.weights[name] ?? {};
      if (String(given) !== String(shape)) {
        throw new Error(`The model wants ${name} of shape (${shape}); the checkpoint has `
          + `${given ? `(${given})` : "no such weight"}.`);
      }
      this.laidOut.set(name, layout(data));
    }
    return this.laidOut.get(name);
  }

  /** Return how a part is switched: by the longest name that it lies within. */
  wayOf(kind, name) {
    let value = this.switches[kind];
    if (isByName(value)) {
      const parts = Object.keys(value).filter((part) => isWithin(name, part));
      value = value[parts.sort((one, other) => other.length - one.length)[0]];
    }
    const way = value ?? SWITCHES[kind][0];
    if (!SWITCHES[kind].some((fit) => fit === way || fit === typeof way)) {
      throw new Error(`The switch ${kind} is one of ${SWITCHES[kind].join(", ")}; got ${way} for `
        + `${name}.`);
    }
    return way;
  }

  switch(kind, name) {
    const way = this.wayOf(kind, name);
    this.settings.push([kind, name, JSON.stringify(way)]);
    return way;
  }

  keep(name, x) {
    if (this.patterns.some((pattern) => pattern.test(name))) this.tensors[name] = x;
    return x;
  }
}

/**
 * Make a model of what readSafetensors returned.
 *
 * The file's header has the `config`; one that is given replaces it. `classes`, `imageSize`,
 * `crop`, `mean` and `std` are the header's too, or `null`, 1 and those of ImageNet.
 */
export const createModel = (file, config) => new Model(file, config);
