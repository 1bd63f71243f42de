/** Draws what the model in the worker computes, and listens to the reader. */
(() => {
  "use strict";

  const written = (value) => value.toFixed(3);
  const strongest = (values) => values.reduce((best, x, i) => (x > values[best] ? i : best), 0);

  function add(parent, name, text, properties = {}) {
    const element = Object.assign(document.createElement(name), properties);
    element.textContent = text;
    parent.append(element);
    return element;
  }

  // The model, in a worker.

  /** Start a worker from its text, and return what asks it a question and awaits the answer. */
  function startWorker(text) {
    const address = URL.createObjectURL(new Blob([text], { type: "text/javascript" }));
    const worker = new Worker(address);
    const waiting = new Map();
    worker.onmessage = ({ data: { id, answer, error } }) => {
      const [resolve, reject] = waiting.get(id);
      waiting.delete(id);
      if (error) reject(new Error(error));
      else resolve(answer);
    };
    // What fails outside of a question leaves all that wait without an answer.
    worker.onerror = ({ message }) => {
      for (const [, reject] of waiting.values())
        reject(new Error(message || "No worker starts here."));
      waiting.clear();
    };
    let last = 0;
    return (name, given = {}) =>
      new Promise((resolve, reject) => {
        waiting.set(++last, [resolve, reject]);
        worker.postMessage({ id: last, name, ...given });
      });
  }

  const bytesOf = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));

  /** Return the bytes of the checkpoint, from this page or from the file that all pages share. */
  async function checkpoint({ base64, address, name, length }, progress) {
    if (base64) return bytesOf(base64).buffer;
    const missing = new Error(
      `There is no ${address} beside this page: run the chapter in a notebook, which brings its own.`,
    );
    if (location.protocol === "file:") {
      // A page that was opened as a file may not fetch, but it may load a script.
      await new Promise((resolve, reject) => {
        const script = Object.assign(document.createElement("script"), { src: address });
        script.onload = resolve;
        script.onerror = () => reject(missing);
        document.head.append(script);
      });
      return bytesOf(globalThis.gcvitCheckpoints[name]).buffer;
    }
    const response = await fetch(address);
    if (response.status === 404) throw missing;
    if (!response.ok) throw new Error(`${address} answers ${response.status}.`);
    const parts = [];
    let arrived = 0;
    for (const reader = response.body.getReader(); ;) {
      const { done, value } = await reader.read();
      if (done) break;
      parts.push(value);
      arrived += value.length;
      progress(arrived / length);
    }
    const text = await new Blob(parts).text();
    return bytesOf(text.split('"')[3]).buffer; // of (...)["name"]="base64"
  }

  /** Return the pixels of an image file, turned as the camera held it, on white. */
  async function pixelsOf(blob) {
    const bitmap = await createImageBitmap(blob, { imageOrientation: "from-image" });
    // Phones refuse a canvas of more than 16 million pixels.
    const scale = Math.min(1, Math.sqrt(2 ** 24 / (bitmap.width * bitmap.height)));
    const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.floor(side * scale));
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.fillStyle = "#fff";
    context.fillRect(0, 0, width, height);
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, width, height);
    return { pixels: context.getImageData(0, 0, width, height).data, height, width };
  }

  // Drawing.

  function colorsOf(heat) {
    return Array.from({ length: 256 }, (_, i) => {
      const at = (i / 255) * (heat.length - 1);
      const [low, high] = [Math.floor(at), Math.ceil(at)].map((j) =>
        parseInt(heat[j].slice(1), 16),
      );
      return [16, 8, 0].map((shift) => {
        const [a, b] = [(low >> shift) & 255, (high >> shift) & 255];
        return a + (b - a) * (at % 1);
      });
    });
  }

  /** Return a small canvas with a pixel for each value, from dark at `least` to light at `most`. */
  function heatmap({ rows, columns, values }, colors, least = 0, most = Math.max(...values)) {
    const canvas = Object.assign(document.createElement("canvas"), {
      width: columns,
      height: rows,
    });
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(columns, rows);
    values.forEach((value, i) => {
      const share = Math.min(Math.max((value - least) / (most - least || 1), 0), 1);
      pixels.data.set([...colors[Math.round(255 * share)], 255], 4 * i);
    });
    context.putImageData(pixels, 0, 0);
    return canvas;
  }

  function cleared(canvas) {
    const ratio = window.devicePixelRatio || 1;
    const wanted = [canvas.clientWidth, canvas.clientHeight].map((side) =>
      Math.max(1, Math.round(side * ratio)),
    );
    if (canvas.width !== wanted[0]) canvas.width = wanted[0];
    if (canvas.height !== wanted[1]) canvas.height = wanted[1];
    return [canvas.getContext("2d"), ...wanted, ratio];
  }

  function drawOver(context, photo, part, heat, wide, high) {
    context.imageSmoothingEnabled = true;
    context.drawImage(photo, ...part, 0, 0, wide, high);
    if (!heat) return;
    context.globalAlpha = 0.8;
    context.imageSmoothingEnabled = false;
    context.drawImage(heat, 0, 0, wide, high);
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

  // The page.

  function start(root) {
    const settings = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
    const find = (selector) => root.querySelector(selector);
    const all = (selector) => [...root.querySelectorAll(selector)];
    const [who, local, global] = all(".view canvas");
    const [blocks, heads, offHeads] = [all("select.block"), all("select.head"), all(".off-head")];
    const [form, trouble] = [find(".switches"), find(".trouble")];
    const colors = colorsOf(settings.heat);
    const state = { level: 0, x: 0.5, y: 0.5, off: {} };
    let ask, made, ran, looked, photo;

    const say = (text) => {
      find(".said").textContent = text;
    };

    /** Do one thing after the other, and say what went wrong. */
    let queue = Promise.resolve();
    const inTurn = (task) => {
      trouble.textContent = "";
      queue = queue.then(task).catch((error) => {
        trouble.textContent = error.message;
      });
      return queue;
    };

    /** Show whether the model is on its way; while it is, it cannot be asked for again. */
    function showLoading(isLoading) {
      find(".load").disabled = isLoading;
      find("progress").hidden = !isLoading;
      find(".start .note").textContent = isLoading ? "The model is on its way." : settings.note;
    }

    async function load() {
      showLoading(true);
      try {
        const buffer = await checkpoint(settings.checkpoint, (share) => {
          find("progress").value = share;
        });
        ask ??= startWorker(root.querySelector('script[type="text/plain"]').textContent);
        const { imageSize } = settings.checkpoint;
        made = await ask("load", { buffer, imageSize });
      } finally {
        showLoading(false);
      }
      fillControls();
      find(".start").hidden = find(".stored").hidden = true;
      find(".running").hidden = false;
      new ResizeObserver(draw).observe(find(".panes"));
      await showExample(0);
    }

    async function showExample(i) {
      const bytes = bytesOf(settings.examples[i].image.split(",")[1]);
      await show(new Blob([bytes]), settings.examples[i].name);
    }

    async function show(blob, name) {
      say("Computing.");
      const seen = await ask(
        "photograph",
        await pixelsOf(blob).catch(() => {
          throw new Error(`This browser cannot read ${name} as a photograph.`);
        }),
      );
      const { width, height } = seen;
      photo = Object.assign(document.createElement("canvas"), { width, height });
      const context = photo.getContext("2d");
      const pixels = context.createImageData(width, height);
      for (let i = 0, j = 0; i < pixels.data.length; i++) {
        pixels.data[i] = i % 4 === 3 ? 255 : seen.pixels[j++];
      }
      context.putImageData(pixels, 0, 0);
      state.name = name;
      await run();
    }

    /** Read the switches that are not as the model was trained. */
    function switches() {
      const field = Object.fromEntries([...form.elements].map((x) => [x.name, x]));
      const [query, level] = [field.query.value, field.level.value];
      const chosen = { query: query === "other" || level === "" ? query : { [level]: query } };
      if (field.gates.value !== "own") chosen.gates = field.gates.value;
      if (field.part.checked) chosen.part = { [made.late]: made.parts };
      if (field.bias.checked) chosen.bias = "off";
      for (const fault of ["flatGather", "zeroPadding"]) {
        if (field[fault].checked) chosen[fault] = true;
      }
      if (Object.keys(state.off).length) chosen.headsOff = state.off;
      return chosen;
    }

    async function run() {
      ran = await ask("run", { switches: switches() });
      form.elements.query.options[1].disabled = !ran.hasOther;
      const best = ran.answers[0];
      find(".answers").replaceChildren();
      for (const { label, name, probability } of ran.answers) {
        const item = add(find(".answers"), "li", "");
        const button = add(item, "button", "", {
          type: "button",
          className: "answer",
          title: "Where does this come from?",
        });
        add(button, "span", name);
        add(button, "span", `${(100 * probability).toFixed(1)}%`, { className: "share" });
        button.style.setProperty("--share", `${100 * probability}%`);
        button.addEventListener("click", () => inTurn(() => activation(label, name)));
      }
      drawStrips();
      await activation(best.label, best.name);
      await look();
      say(
        `${state.name}: ${best.name}, ${(100 * best.probability).toFixed(1)} percent. ` +
          `${ran.computed} of ${ran.steps} steps computed in ${ran.milliseconds.toFixed(0)} ms.`,
      );
    }

    // The token, and whom it attends to.

    const layer = () => ran.levels[state.level];

    function token() {
      const {
        rows,
        columns,
        window: [h, w],
      } = layer();
      const [row, column] = [
        [state.y, rows],
        [state.x, columns],
      ].map(([part, side]) => Math.min(Math.floor(part * side), side - 1));
      return { row, column, top: Math.floor(row / h), left: Math.floor(column / w) };
    }

    async function look() {
      const { row, column } = token();
      looked = await ask("attention", {
        level: state.level,
        row,
        column,
        blocks: blocks.map((select) => (select.value === "" ? -1 : Number(select.value))),
        heads: heads.map((select) => Number(select.value)),
      });
      describe();
      draw();
    }

    function describe() {
      const { row, column, top, left } = token();
      const {
        window: [h, w],
        columns,
      } = layer();
      const key = strongest(looked.local);
      local.setAttribute(
        "aria-label",
        `Local, block ${blocks[0].value}: the token at row ${row}, ` +
          `column ${column} attends most to row ${top * h + Math.floor(key / w)}, column ` +
          `${left * w + (key % w)}, weight ${written(looked.local[key])}.`,
      );
      const tops = [Math.max(...looked.local)];
      if (looked.global) {
        const best = strongest(looked.global);
        tops.push(looked.global[best]);
        global.setAttribute(
          "aria-label",
          `Global, block ${blocks[1].value}: the query token at row ` +
            `${row % h}, column ${column % w} attends most to row ${Math.floor(best / columns)}, ` +
            `column ${best % columns}, weight ${written(looked.global[best])}.`,
        );
      }
      all(".scale span").forEach((place, i) => {
        place.textContent = tops[i] === undefined ? "" : written(tops[i]);
      });
      say(
        `Token at row ${row}, column ${column}. ${local.ariaLabel} ${looked.global ? global.ariaLabel : ""}`,
      );
      describeArithmetic();
    }

    function describeArithmetic() {
      const holder = find(".arithmetic .scroll");
      holder.replaceChildren();
      looked.arithmetic.forEach((one, i) => {
        const table = add(holder, "table", "");
        add(
          table,
          "caption",
          `${["Local", "Global"][i]}, head ${one.head}, key ${one.key} of the token's window`,
        );
        for (const [name, values] of [
          ["query", one.q],
          ["key", one.k],
          ["product", one.products],
        ]) {
          const line = add(table, "tr", "");
          add(line, "th", name, { scope: "row" });
          for (const value of values) add(line, "td", value.toFixed(2));
        }
        add(
          holder,
          "p",
          `sum ${written(one.dot)} × scale ${written(one.scale)} = score ${written(one.score)}; ` +
            `+ position bias ${written(one.bias)}; softmax: ${written(one.exp)} / ${written(one.sum)} = ` +
            `weight ${written(one.weight)}`,
        );
      });
    }

    function draw() {
      if (!looked || !photo) return;
      const {
        rows,
        columns,
        window: [h, w],
        windows,
      } = layer();
      const { row, column, top, left } = token();
      const [width, height] = [photo.width, photo.height];
      const whole = [0, 0, width, height];
      const place = [row % h, column % w];
      who.style.aspectRatio = global.style.aspectRatio = `${width} / ${height}`;
      local.style.aspectRatio = `${(w * width) / columns} / ${(h * height) / rows}`;

      let [context, wide, high, ratio] = cleared(who);
      const cell = [high / rows, wide / columns];
      drawOver(context, photo, whole, null, wide, high);
      drawGrid(context, [h * cell[0], w * cell[1]], ratio);
      drawFrame(context, place, [high / h, wide / w], settings.global, 3 * ratio);
      if (windows[0] * windows[1] > 1) {
        drawFrame(context, [top, left], [h * cell[0], w * cell[1]], settings.local, ratio);
      }
      drawFrame(
        context,
        [row, column],
        cell,
        settings.local,
        3 * ratio,
        cell[1] < 24 * ratio ? 0 : 6 * ratio,
      );

      [context, wide, high, ratio] = cleared(local);
      const [down, right] = [height / rows, width / columns];
      drawOver(
        context,
        photo,
        [left * w * right, top * h * down, w * right, h * down],
        heatmap({ rows: h, columns: w, values: looked.local }, colors),
        wide,
        high,
      );
      drawFrame(context, place, [high / h, wide / w], settings.local, 3 * ratio);

      [context, wide, high, ratio] = cleared(global);
      const heat = looked.global && heatmap({ rows, columns, values: looked.global }, colors);
      drawOver(context, photo, whole, heat, wide, high);
      const window = [(h * high) / rows, (w * wide) / columns];
      drawGrid(context, window, ratio);
      if (windows[0] * windows[1] > 1)
        drawFrame(context, [top, left], window, settings.local, 2 * ratio);
    }

    // Strips of small pictures.

    function picture(holder, map, caption, fromZero = false) {
      const figure = add(holder, "figure", "");
      const canvas = add(figure, "canvas", "", { className: "small" });
      canvas.setAttribute("role", "img");
      const [least, most] = [Math.min(...map.values), Math.max(...map.values)];
      canvas.setAttribute("aria-label", `${caption}, from ${written(least)} to ${written(most)}`);
      Object.assign(canvas, { width: photo.width, height: photo.height });
      drawOver(
        canvas.getContext("2d"),
        photo,
        [0, 0, photo.width, photo.height],
        heatmap(map, colors, fromZero ? 0 : least, most),
        canvas.width,
        canvas.height,
      );
      add(figure, "figcaption", caption);
    }

    /** Say where a layer is, whose name is that of the checkpoint. */
    function placeOf(name) {
      const [, level, inside] = name.match(/^(?:levels\.(\d+)\.)?(\w+)/);
      if (!level) return "stem";
      const step = name.match(/to_q_global\.(\d+)/);
      const place = step ? `generator, step ${Number(step[1]) + 1}` : inside;
      return `level ${Number(level) + 1}, ${place}`;
    }

    function drawStrips() {
      const [generator, maps, gates] = [".generator", ".maps", ".gates"].map(find);
      for (const strip of [generator, maps, gates]) strip.replaceChildren();
      const { steps, query } = layer();
      steps.forEach((step, i) =>
        picture(generator, step, `step ${i + 1}: ${step.rows} × ${step.columns}`),
      );
      picture(generator, query, `global query: ${query.rows} × ${query.columns}`);
      ran.levels.forEach(({ map }, i) =>
        picture(maps, map, `level ${i + 1}: ${map.rows} × ${map.columns}`),
      );
      for (const { name, values, places } of ran.gates) {
        const figure = add(gates, "figure", "");
        const sorted = Float32Array.from(values).sort();
        const text =
          `${placeOf(name)}: ${written(sorted[0])} to ` +
          `${written(sorted.at(-1))}${places ? ", in each place" : ""}`;
        const strip = heatmap({ rows: 1, columns: values.length, values }, colors, 0, 1);
        strip.className = "gate";
        strip.setAttribute("role", "img");
        strip.setAttribute("aria-label", text);
        figure.append(strip);
        add(figure, "figcaption", text);
      }
    }

    async function activation(label, name) {
      const map = await ask("activation", { label });
      find(".activation").replaceChildren();
      picture(find(".activation"), map, `what each place adds to ${name}`, true);
      say(`Shown: what each place adds to ${name}.`);
    }

    // Controls.

    function fillControls() {
      settings.examples.forEach(({ name, image }, i) => {
        const label = add(find(".examples"), "label", "");
        const input = add(label, "input", "", {
          type: "radio",
          name: "example",
          value: i,
          checked: !i,
        });
        label.append(Object.assign(document.createElement("img"), { src: image, alt: "" }));
        add(label, "span", name);
        input.addEventListener("change", () => inTurn(() => showExample(i)));
      });
      made.levels.forEach((_, i) => {
        const label = add(find(".levels"), "label", "");
        add(label, "input", "", {
          type: "radio",
          name: "level",
          value: i,
          checked: !i,
        }).addEventListener("change", () =>
          inTurn(async () => {
            enter(i);
            drawStrips();
            await look();
          }),
        );
        add(label, "span", i + 1);
      });
      // Group names must not meet those of another explorer on the page.
      const group = document.querySelectorAll(".gcvit-page[data-ready]").length;
      all("input[type=radio]").forEach((input) => {
        input.name += `-${group}`;
      });
      add(form.elements.level, "option", "all levels", { value: "" });
      made.levels.forEach((_, i) =>
        add(form.elements.level, "option", `level ${i + 1}`, { value: `levels.${i}` }),
      );
      const late = made.levels.findIndex(({ window }) =>
        window.some((side, axis) => side > made.parts[axis]),
      );
      made.late = `levels.${late}`;
      form.elements.part.closest("label").hidden = late < 0;
      form.querySelector(".check span").textContent =
        `level ${late + 1}: windows in parts of ${made.parts.join(" × ")}`;
      enter(0);
    }

    function enter(level) {
      state.level = level;
      const { depth, heads: count } = made.levels[level];
      [0, 1].forEach((kind) => {
        blocks[kind].replaceChildren();
        for (let j = kind; j < depth; j += 2)
          add(blocks[kind], "option", `block ${j}`, { value: j });
        heads[kind].replaceChildren();
        add(heads[kind], "option", `mean of ${count} heads`, { value: -1 });
        for (let head = 0; head < count; head++)
          add(heads[kind], "option", `head ${head}`, { value: head });
      });
      syncHeads();
    }

    /** Show whether the chosen head is switched off; the mean is no head. */
    function syncHeads() {
      offHeads.forEach((box, i) => {
        const head = Number(heads[i].value);
        box.disabled = head < 0;
        box.checked = (state.off[`levels.${state.level}.blocks.${blocks[i].value}`] ?? []).includes(
          head,
        );
      });
    }

    offHeads.forEach((box, i) =>
      box.addEventListener("change", () => {
        const name = `levels.${state.level}.blocks.${blocks[i].value}`;
        const others = (state.off[name] ?? []).filter((head) => head !== Number(heads[i].value));
        if (box.checked) others.push(Number(heads[i].value));
        if (others.length) state.off[name] = others;
        else delete state.off[name];
        inTurn(run);
      }),
    );
    [...blocks, ...heads].forEach((select) =>
      select.addEventListener("change", () => {
        syncHeads();
        inTurn(look);
      }),
    );
    form.addEventListener("change", () => inTurn(run));
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => {
      state.off = {};
      // The fields change after this event.
      setTimeout(() => {
        syncHeads();
        inTurn(run);
      });
    });

    function point(event, canvas) {
      if (!ran) return;
      const box = canvas.getBoundingClientRect();
      const part = [
        (event.clientY - box.top) / box.height,
        (event.clientX - box.left) / box.width,
      ].map((value) => Math.max(0, Math.min(0.999, value)));
      const {
        rows,
        columns,
        window: [h, w],
      } = layer();
      const { top, left } = token();
      [state.y, state.x] =
        canvas === local
          ? [((top + part[0]) * h) / rows, ((left + part[1]) * w) / columns].map((x) =>
              Math.min(x, 0.999),
            )
          : part;
      inTurn(look);
    }

    for (const canvas of [who, local, global]) {
      const view = canvas.parentElement;
      view.addEventListener("pointerdown", (event) => {
        // A finger may only want to scroll: it points when it taps or moves sideways.
        if (event.button || event.pointerType === "touch") return;
        view.setPointerCapture(event.pointerId);
        point(event, canvas);
      });
      view.addEventListener("pointermove", (event) => {
        if (event.buttons & 1) point(event, canvas);
      });
      view.addEventListener("click", (event) => point(event, canvas));
    }

    find(".who").addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[
        event.key
      ];
      if (!step || !ran || event.altKey || event.ctrlKey || event.metaKey) return;
      // The page must not scroll, and the book must not turn the page.
      event.preventDefault();
      event.stopPropagation();
      const { rows, columns, window } = layer();
      const { row, column } = token();
      const [down, right] = event.shiftKey ? window : [1, 1];
      const within = (value, side) => (Math.max(0, Math.min(side - 1, value)) + 0.5) / side;
      state.y = within(row + step[0] * down, rows);
      state.x = within(column + step[1] * right, columns);
      inTurn(look);
    });

    // The reader's own photograph.

    const take = (file) => {
      if (file && ask) inTurn(() => show(file, file.name || "your photograph"));
    };
    all("input[type=file]").forEach((input) =>
      input.addEventListener("change", () => take(input.files[0])),
    );
    root.addEventListener("dragover", (event) => event.preventDefault());
    root.addEventListener("drop", (event) => {
      event.preventDefault();
      take(event.dataTransfer.files[0]);
    });
    document.addEventListener("paste", (event) => {
      const image = [...event.clipboardData.files].find((file) => file.type.startsWith("image/"));
      if (image) take(image);
    });

    const ramp = `linear-gradient(to right, ${settings.heat.join(", ")})`;
    all(".scale i").forEach((bar) => {
      bar.style.background = ramp;
    });
    for (const kind of ["local", "global"])
      find(`.key .${kind}`).style.borderColor = settings[kind];
    showLoading(false);
    find(".load").addEventListener("click", () => inTurn(load));
    find(".off").remove();
    find(".tool").hidden = false;
  }

  for (const root of document.querySelectorAll(".gcvit-page:not([data-ready])")) {
    root.dataset.ready = "";
    start(root);
  }
})();
