/** Puts the panels together, loads the model, and shows it photographs. */

/** The panels, in the model's own order, by the place that a page has for each of them. */
const PANELS = {
  ".answers": answerPanel,
  ".all-classes": classPanel,
  ".switches": switchPanel,
  ".maps": mapPanel,
  ".who": attentionPanel,
  ".arithmetic": arithmeticPanel,
  ".gates": gatePanel,
  ".looks": looksPanel,
  ".activation": activationPanel,
};

/** The page as its panels know it: settings, what was computed, and ways to ask for more. */
function pageOf(root) {
  const settings = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
  const page = {
    root,
    settings,
    // Group names must not meet those of another explorer on the page.
    group: document.querySelectorAll(".gcvit-page[data-ready]").length,
    colors: colorsOf(settings.heat),
    find: (selector) => root.querySelector(selector),
    all: (selector) => [...root.querySelectorAll(selector)],
    state: { level: 0, x: 0.5, y: 0.5, off: {} },
    switches: () => ({}),
    isSwitched: () => false,
  };
  const [status, trouble] = [".said", ".trouble"].map(page.find);

  page.say = (text) => {
    status.textContent = text;
  };

  /**
   * Do one thing after the other, and say what went wrong. Of things of one kind that wait, only
   * the newest is done: a pointer moves faster than a slow machine computes.
   */
  let queue = Promise.resolve();
  const newest = {};
  page.inTurn = (task, kind) => {
    const mine = kind && (newest[kind] = {});
    trouble.textContent = "";
    queue = queue
      .then(() => (kind && newest[kind] !== mine ? undefined : task()))
      .catch((error) => {
        page.say("");
        trouble.textContent = error.message;
      });
    return queue;
  };

  const panels = Object.entries(PANELS)
    .filter(([place]) => page.find(place))
    .map(([, make]) => make(page));
  /** Let the panels hear of something, one after the other. */
  page.tell = async (event, given) => {
    for (const panel of panels) await panel[event]?.(given);
  };

  page.choose = (label) => page.inTurn(() => {
    page.state.label = label;
    return page.tell("label");
  });

  page.run = async () => {
    page.ran = await page.ask("run", { switches: page.switches() });
    const { now, computed, steps, milliseconds } = page.ran;
    page.state.label = strongest(now.logits);
    await page.tell("ran");
    await page.tell("label");
    const best = now.probabilities[page.state.label];
    page.say([
      `${page.state.name}: ${page.made.classes[page.state.label]},`,
      `${(100 * best).toFixed(1)} percent.`,
      effectOf(page),
      `${computed} of ${steps} steps computed in ${milliseconds.toFixed(0)} ms.`,
    ].filter(Boolean).join(" "));
  };
  return page;
}

function start(root) {
  const page = pageOf(root);
  const { find, all, settings, inTurn } = page;
  let isRunning;

  /** Show whether the model is on its way; while it is, it cannot be asked for again. */
  function showLoading(isLoading) {
    find(".load").disabled = isLoading;
    find("progress").hidden = !isLoading;
    find(".start .note").textContent = isLoading ? "The model is on its way." : settings.note;
  }

  /** Make a model of a checkpoint's bytes, and let the panels take it up. */
  async function take(buffer, name, imageSize) {
    page.ask ??= startWorker(root.querySelector('script[type="text/plain"]').textContent);
    page.made = await page.ask("load", { buffer, imageSize }, [buffer]);
    const { classes, imageSize: sides } = page.made;
    find(".model").textContent = `${name}: ${classes.length} classes, images of `
      + `${sides.join(" × ")} px.`;
    find(".ours").hidden = name === settings.checkpoint.name;
    page.ran = null;
    page.state.level = 0;
    await page.tell("loaded");
    find(".start").hidden = find(".stored").hidden = true;
    find(".running").hidden = false;
    isRunning = true;
  }

  /** Load the book's checkpoint. */
  async function load() {
    showLoading(true);
    try {
      const buffer = await checkpoint(settings.checkpoint, (share) => {
        find("progress").value = share;
      });
      await take(buffer, settings.checkpoint.name, settings.checkpoint.imageSize);
    } finally {
      showLoading(false);
    }
  }

  /** Explore the reader's own checkpoint: what `gcvit train` has written. */
  async function open(file) {
    page.say("Reading the checkpoint.");
    try {
      if (file.size > MOST_BYTES) throw new Error("It is larger than 1 GB.");
      await page.tell("photograph");
      await take(await file.arrayBuffer(), file.name);
    } catch (error) {
      throw new Error(`${file.name} is no checkpoint that can be run here. ${error.message}`);
    }
    await showAgain();
  }

  async function showExample(i) {
    const { name, image } = settings.examples[i];
    await show(new Blob([bytesOf(image.split(",")[1])]), name);
  }

  async function show(blob, name) {
    page.say("Computing.");
    const given = await pixelsOf(blob).catch(() => {
      throw new Error(`This browser cannot read ${name} as a photograph.`);
    });
    await page.tell("photograph");
    const taken = await page.ask("photograph", given, [given.pixels.buffer]);
    Object.assign(page.state, { blob, name });
    page.photo = canvasOf(taken.pixels, taken.width, taken.height);
    await page.run();
  }

  /** Show another model the photograph that the one before was shown. */
  async function showAgain() {
    const { blob, name } = page.state;
    if (blob) await show(blob, name);
    else await showExample(0);
  }

  function fillExamples() {
    settings.examples.forEach(({ name, image }, i) => {
      const label = add(find(".examples"), "label");
      const input = add(label, "input", "", {
        type: "radio", name: `example-${page.group}`, value: i, checked: !i,
      });
      label.append(Object.assign(document.createElement("img"), { src: image, alt: "" }));
      add(label, "span", name);
      input.addEventListener("change", () => inTurn(() => showExample(i)));
    });
  }

  /** Take a file: a checkpoint, or a photograph, for which the model is loaded first. */
  function receive(file) {
    if (!file) return;
    inTurn(async () => {
      if (file.name.endsWith(".safetensors")) return open(file);
      if (!isRunning) await load();
      all(".examples input").forEach((input) => (input.checked = false));
      return show(file, file.name || "your photograph");
    });
  }

  all("input[type=file]").forEach((input) => input.addEventListener("change", () => {
    const [file] = input.files;
    input.value = ""; // the same file may be chosen again
    if (input.accept === ".safetensors") inTurn(() => open(file));
    else receive(file);
  }));
  const showTarget = (isTarget) => root.classList.toggle("target", isTarget);
  root.addEventListener("dragover", (event) => {
    event.preventDefault();
    showTarget(true);
  });
  root.addEventListener("dragleave", ({ relatedTarget }) => {
    if (!root.contains(relatedTarget)) showTarget(false);
  });
  root.addEventListener("drop", (event) => {
    event.preventDefault();
    showTarget(false);
    receive(event.dataTransfer.files[0]);
  });
  document.addEventListener("paste", (event) => {
    receive([...event.clipboardData.files].find((file) => file.type.startsWith("image/")));
  });
  find(".load").addEventListener("click", () => inTurn(async () => {
    await load();
    await showAgain();
  }));
  find(".ours").addEventListener("click", () => inTurn(async () => {
    await load();
    await showAgain();
  }));
  fillExamples();
  showLoading(false);
  find(".off").remove();
  find(".tool").hidden = false;
}

for (const root of document.querySelectorAll(".gcvit-page:not([data-ready])")) {
  root.dataset.ready = "";
  start(root);
}
