/**
 * The panels of the page. Each is made once, and hears what has happened: `loaded` (a model),
 * `photograph` (is about to be shown), `ran` (the model), `level`, `token`, `label` (another one
 * was chosen).
 */

// The answer.

/** Say how a run with switches differs from one of the model as it was trained. */
function effectOf({ made, ran }) {
  const { now, trained } = ran;
  const first = strongest(trained.logits);
  const changes = now.logits.map((logit, i) => logit - trained.logits[i]);
  const most = strongest(changes.map(Math.abs));
  if (!changes[most]) return "";
  const change = (i) => `${made.classes[i]} ${signed(changes[i], 2)}`;
  const best = strongest(now.logits);
  const winner = best === first
    ? `${made.classes[first]} stays first`
    : `${made.classes[best]} wins; as trained, ${made.classes[first]} does`;
  return `${winner}. Largest change of a logit: ${change(most)}; `
    + `the first class: ${change(first)}.`;
}

function answerPanel(page) {
  const list = page.find(".answers");

  function showAnswer(label) {
    const { now, trained } = page.ran;
    const [share, before] = [now.probabilities[label], trained.probabilities[label]];
    const button = add(add(list, "li"), "button", "", {
      type: "button",
      className: "answer",
      title: "Where does this come from?",
    });
    add(button, "span", page.made.classes[label]);
    add(button, "span", percent(share), { className: "share" });
    if (page.isSwitched()) add(button, "small", points(share - before), { className: "change" });
    button.style.setProperty("--share", percent(share));
    button.addEventListener("click", () => page.choose(label));
  }

  return {
    ran() {
      const { probabilities } = page.ran.now;
      const order = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]);
      list.replaceChildren();
      order.slice(0, 5).forEach(showAnswer);
      page.find(".unsure").hidden = probabilities[order[0]] >= 0.5;
      page.find(".unsure .best").textContent = percent(probabilities[order[0]]);
      page.find(".effect").textContent = effectOf(page);
      const note = page.find(".points");
      if (note) note.hidden = !page.isSwitched();
    },
  };
}

/** The list of all classes, which the reader searches. */
function classPanel(page) {
  const [search, list, count] = [".search", ".all-classes", ".count"].map(page.find);
  const rows = () => [...list.children];

  function filter() {
    const wanted = search.value.trim().toLowerCase();
    for (const row of rows()) row.hidden = !row.dataset.name.includes(wanted);
    const left = rows().filter((row) => !row.hidden).length;
    count.textContent = wanted ? `${left} of ${rows().length} classes` : "";
  }

  search.addEventListener("input", filter);
  return {
    loaded() {
      list.replaceChildren();
      page.made.classes.forEach((name, label) => {
        const row = add(list, "li");
        row.dataset.name = name.toLowerCase();
        const button = add(row, "button", "", { type: "button", className: "answer" });
        add(button, "span", name);
        add(button, "span", "", { className: "share" });
        button.addEventListener("click", () => page.choose(label));
      });
      page.find(".number").textContent = page.made.classes.length;
      search.value = "";
      filter();
    },
    ran() {
      rows().forEach((row, label) => {
        const share = percent(page.ran.now.probabilities[label]);
        row.querySelector(".share").textContent = share;
        row.firstChild.style.setProperty("--share", share);
      });
    },
  };
}

/** What each place adds to the logit of the class that was chosen. */
function activationPanel(page) {
  const holder = page.find(".activation");
  return {
    async label() {
      const { label } = page.state;
      const name = page.made.classes[label];
      const map = await page.ask("activation", { label });
      const [canvas, numbers] = pictured(page.photo, map, page.colors, true);
      holder.replaceChildren();
      const caption = `what each place adds to ${name}`;
      addPicture(holder, canvas, caption + numbers);
      page.say(`Shown: ${caption}.`);
    },
  };
}

/** Where the global query looks, on the opening page. */
function looksPanel(page) {
  const holder = page.find(".looks");
  return {
    async ran() {
      const map = await page.ask("looks");
      holder.replaceChildren();
      if (!map) return;
      const [canvas, numbers] = pictured(page.photo, map, page.colors, true);
      const caption = `where the global query of level ${map.level + 1} looks, `
        + "averaged over its tokens and heads";
      addPicture(holder, canvas, caption + numbers);
    },
  };
}

// The maps.

function mapPanel(page) {
  const [maps, generator, as, channel] = [".maps", ".generator", "select.as", "input.channel"]
    .map(page.find);

  /** Say what a step of the generator does, which its sizes tell. */
  function stepOf(i, steps) {
    const [before, { rows, columns }] = [steps[i - 1], steps[i]];
    const to = `${rows} × ${columns}`;
    if (!i) return `the map that enters the level: ${to}`;
    const isSame = before.rows === rows && before.columns === columns;
    if (i === steps.length - 1) return `global query: ${isSame ? to : `resized to ${to}`}`;
    return `step ${i}: refined${isSame ? `, still ${to}` : `, then halved to ${to}`}`;
  }

  function show(holder, map, caption) {
    const [canvas, numbers] = pictured(page.photo, map, page.colors);
    const which = map.channel === undefined ? "" : `, channel ${map.channel}`;
    addPicture(holder, canvas, caption + which + numbers);
  }

  async function draw() {
    channel.closest("label").hidden = as.value !== "channel";
    page.find(".range").hidden = as.value === "directions";
    const answer = await page.ask("maps", {
      level: page.state.level,
      as: as.value,
      channel: Math.max(0, Math.floor(Number(channel.value))),
    });
    channel.max = answer.channels - 1;
    maps.replaceChildren();
    generator.replaceChildren();
    answer.levels.forEach((map, i) =>
      show(maps, map, `level ${i + 1}: ${map.rows} × ${map.columns}`));
    answer.generator.forEach((map, i) => show(generator, map, stepOf(i, answer.generator)));
  }

  for (const control of [as, channel]) {
    control.addEventListener("input", () => page.inTurn(draw, "maps"));
  }
  return { ran: draw, level: draw };
}

// The arithmetic behind a weight.

function arithmeticPanel(page) {
  const [details, grid, table, sums] = [".arithmetic", ".cells", ".lines", ".sums"].map(page.find);
  const kinds = page.all(".kind input");
  const numbers = (values) => [...values].map((value) => numbered(value, 2));
  let cells, lit;

  const kind = () => kinds.findIndex((input) => input.checked);
  const places = (key) => [Math.floor(key / page.layer().window[1]), key % page.layer().window[1]];

  /** Say where a key lies, seen from the query. */
  function seenFrom(key) {
    const [from, to] = [places(cells.query), places(key)];
    const [down, right] = [to[0] - from[0], to[1] - from[1]];
    const parts = [];
    if (down) parts.push(`${Math.abs(down)} ${down > 0 ? "down" : "up"}`);
    if (right) parts.push(`${Math.abs(right)} ${right > 0 ? "right" : "left"}`);
    return parts.join(", ") || "same place";
  }

  function drawCells() {
    const [h, w] = page.layer().window;
    const weights = cells.lines.map((line) => line.weight);
    const bytes = heatOf(weights, page.colors, 0, Math.max(...weights));
    grid.replaceChildren();
    grid.style.setProperty("--columns", w);
    for (let i = 0; i < h; i++) {
      const row = add(grid, "div", "", { role: "row" });
      for (let j = 0; j < w; j++) {
        const key = i * w + j;
        const [red, green, blue] = bytes.subarray(3 * key, 3 * key + 3);
        const weight = numbered(weights[key], 2);
        const cell = add(row, "div", w > 8 ? "" : weight, { tabIndex: -1 });
        cell.setAttribute("role", "gridcell");
        cell.setAttribute("aria-label", `row ${i}, column ${j}: weight ${weight}`);
        cell.style.background = `rgb(${red}, ${green}, ${blue})`;
        cell.style.color = 0.3 * red + 0.59 * green + 0.11 * blue > 120 ? "#000" : "#fff";
        cell.classList.toggle("query", key === cells.query);
        cell.addEventListener("pointerenter", () => light(key));
        cell.addEventListener("focus", () => light(key));
      }
    }
  }

  function drawLines() {
    const body = table.tBodies[0];
    body.replaceChildren();
    cells.lines.forEach((line, key) => {
      const { dot, score, bias, exp, weight } = line;
      const row = addLine(body, places(key).join(", "), [
        written(dot), written(score), seenFrom(key), written(bias), written(score + bias),
        written(exp), written(weight),
      ]);
      row.addEventListener("pointerenter", () => light(key));
    });
  }

  /** Write out one key's line: its product with the query, its weight, and what it carries. */
  function drawSums(line) {
    const { q, k, products, dot, scale, score, bias, exp, sum, weight } = line;
    sums.replaceChildren();
    const product = add(sums, "table");
    add(product, "caption", `q · k: head ${cells.head}, query ${places(cells.query).join(", ")}, `
      + `key ${places(lit).join(", ")} of the token's window`);
    for (const [name, values] of [["query", q], ["key", k], ["product", products]]) {
      addLine(product, name, numbers(values));
    }
    const from = bias < -1e8 ? "masked, another part of the window"
      : `position bias ${written(bias)} (${seenFrom(lit)}: row ${line.tableRow} of the table)`;
    add(sums, "p", `sum ${written(dot)} × scale ${written(scale)} = score ${written(score)}; `
      + `+ ${from}; softmax over the window: ${written(exp)} / ${written(sum)} = weight `
      + written(weight));
    const carried = add(sums, "table");
    add(carried, "caption", "What the key brings, and what the whole window brings");
    addLine(carried, "value", numbers(line.value));
    addLine(carried, `× ${written(weight)}`, numbers(line.weighted));
    addLine(carried, "sum over the keys", numbers(cells.mixed));
  }

  /** Light a key's cell and line. */
  function light(key, isFocused = false) {
    if (!cells || key >= cells.lines.length) return;
    lit = key;
    const all = [...grid.querySelectorAll("[role=gridcell]")];
    const rows = [...table.tBodies[0].rows];
    for (const [i, elements] of [all, rows].map((list) => [list.indexOf(list[key]), list])) {
      elements.forEach((element, j) => element.classList.toggle("lit", i === j));
    }
    all.forEach((cell, i) => (cell.tabIndex = i === key ? 0 : -1));
    if (isFocused) all[key].focus();
    // Only the table is scrolled, never the page.
    const [row, view] = [rows[key], table.parentElement];
    const [above, below] = [row.offsetTop - view.scrollTop - table.tHead.offsetHeight,
      row.offsetTop + row.offsetHeight - view.scrollTop - view.clientHeight];
    if (above < 0) view.scrollTop += above;
    else if (below > 0) view.scrollTop += below;
    drawSums(cells.lines[key]);
  }

  async function draw() {
    const { depth } = page.made.levels[page.state.level];
    kinds[1].disabled = depth < 2;
    if (depth < 2) kinds[0].checked = true;
    if (!details.open || !page.ran) return;
    const { row, column } = page.token();
    const [blocks, heads] = page.chosen();
    cells = await page.ask("cells", {
      level: page.state.level, row, column, block: blocks[kind()], head: heads[kind()],
    });
    drawCells();
    drawLines();
    light(cells.strongest);
  }

  grid.addEventListener("keydown", (event) => {
    const w = page.layer().window[1];
    const [i, j] = places(lit);
    const [h] = page.layer().window;
    const to = {
      ArrowUp: [i - 1, j], ArrowDown: [i + 1, j], ArrowLeft: [i, j - 1], ArrowRight: [i, j + 1],
    }[event.key];
    if (!to || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    if (to[0] >= 0 && to[0] < h && to[1] >= 0 && to[1] < w) light(to[0] * w + to[1], true);
  });
  for (const input of kinds) {
    input.name += `-${page.group}`; // two explorers on one page must not share it
    input.addEventListener("change", () => page.inTurn(draw));
  }
  details.addEventListener("toggle", () => page.inTurn(draw));
  return {
    token: draw,
    /** Light the cell of the window that the reader points at in a picture. */
    pointed([block, key]) {
      if (details.open && cells && block === kind()) light(key);
    },
  };
}

// The gates.

/** Say where a layer is, whose name is that of the checkpoint. */
function placeOf(name) {
  const [, level, inside] = name.match(/^(?:levels\.(\d+)\.)?(\w+)/);
  if (!level) return "stem";
  const step = name.match(/to_q_global\.(\d+)/);
  const place = step ? `generator, step ${Number(step[1]) + 1}` : inside;
  return `level ${Number(level) + 1}, ${place}`;
}

function gatePanel(page) {
  const [strips, details, which, channel, holder] = [
    ".gates", ".gate-arithmetic", "select.gate-of", "input.gate-channel", ".gate-sums",
  ].map(page.find);

  function showStrip({ name, places, least, most, means }) {
    const text = `${placeOf(name)}: ${written(least)} to ${written(most)}`
      + `${places ? "; shown are means over the places" : ""}`;
    const map = { rows: 1, columns: means.length, values: means };
    const strip = heatmap(map, page.colors, 0, 1);
    strip.classList.add("gate");
    addPicture(strips, strip, text);
    strip.addEventListener("click", ({ offsetX }) => {
      which.value = name;
      channel.value = Math.floor((offsetX / strip.clientWidth) * means.length);
      details.open = true;
      page.inTurn(draw);
    });
  }

  const barOf = (values) => {
    const least = Math.min(...values);
    const bar = heatmap({ rows: 1, columns: values.length, values }, page.colors, least);
    bar.classList.add("gate");
    return bar;
  };

  /** Write out the two dense layers behind the gate of a channel. */
  function write({ averages, sums, hidden, weights, products, sum, computed, used }, gate, number) {
    holder.replaceChildren();
    const from = gate.places ? "the channels at the token's place" : "the channels' averages";
    addPicture(holder, barOf(averages), `1. Squeeze: ${from}, ${averages.length} numbers, from `
      + `${written(Math.min(...averages))} to ${written(Math.max(...averages))}`);
    const table = add(holder, "table");
    add(table, "caption",
      `2. Excitation: ${hidden.length} hidden units; weights of channel ${number}`);
    const head = add(table, "tr");
    for (const name of ["unit", "averages · weights", "GELU", "× weight", "product"]) {
      add(head, "th", name, { scope: "col" });
    }
    hidden.forEach((value, i) =>
      addLine(table, i, [sums[i], value, weights[i], products[i]].map(written)));
    const switched = Math.abs(used - computed) > 1e-4
      ? `; the switch puts ${written(used)} in its place` : "";
    add(holder, "p", `3. Sum of the products ${written(sum)}; sigmoid: 1 / (1 + exp(`
      + `${written(-sum)})) = gate ${written(computed)}${switched}. Channel ${number} of the map `
      + "is multiplied with it.");
  }

  async function draw() {
    if (!details.open || !page.ran) return;
    const gate = page.ran.gates.find(({ name }) => name === which.value);
    channel.max = gate.means.length - 1;
    const number = Math.min(Math.max(0, Math.floor(Number(channel.value))), channel.max);
    const place = [page.state.y, page.state.x];
    write(await page.ask("gate", { layer: gate.name, channel: number, place }), gate, number);
  }

  for (const control of [which, channel]) {
    control.addEventListener("input", () => page.inTurn(draw, "gate"));
  }
  details.addEventListener("toggle", () => page.inTurn(draw));
  return {
    async ran() {
      strips.replaceChildren();
      page.ran.gates.forEach(showStrip);
      fill(which, page.ran.gates.map(({ name }) => [name, placeOf(name)]));
      await draw();
    },
    token: draw,
  };
}
