/** The panel of the token pointed at, and of whom it attends to: locally and globally. */

function attentionPanel(page) {
  const [who, local, global] = page.all(".view canvas");
  const [blocks, heads, offHeads] = ["select.block", "select.head", ".off-head"].map(page.all);
  const { state, settings } = page;
  let looked;

  page.layer = () => page.ran.levels[state.level];

  page.token = () => {
    const { rows, columns, window: [h, w] } = page.layer();
    const [row, column] = [[state.y, rows], [state.x, columns]].map(([part, side]) =>
      Math.min(Math.floor(part * side), side - 1));
    return { row, column, top: Math.floor(row / h), left: Math.floor(column / w) };
  };

  /** Return the blocks and the heads that are looked at; -1 is no block, or the mean. */
  page.chosen = () => [
    blocks.map((select) => (select.value === "" ? -1 : Number(select.value))),
    heads.map((select) => Number(select.value)),
  ];

  async function look() {
    const { row, column } = page.token();
    const [blockNumbers, headNumbers] = page.chosen();
    looked = await page.ask("attention", {
      level: state.level, row, column, blocks: blockNumbers, heads: headNumbers,
    });
    describe();
    draw();
    await page.tell("token");
  }

  function describe() {
    const { row, column, top, left } = page.token();
    const { window: [h, w], columns } = page.layer();
    const key = strongest(looked.local);
    local.setAttribute("aria-label",
      `Local, block ${blocks[0].value}: the token at row ${row}, column ${column} attends most to `
      + `row ${top * h + Math.floor(key / w)}, column ${left * w + (key % w)}, weight `
      + `${written(looked.local[key])}.`);
    const tops = [looked.local[key]];
    global.setAttribute("aria-label", "This level has no global block.");
    if (looked.global) {
      const best = strongest(looked.global);
      tops.push(looked.global[best]);
      global.setAttribute("aria-label",
        `Global, block ${blocks[1].value}: the query token at row ${row % h}, column `
        + `${column % w} attends most to row ${Math.floor(best / columns)}, column `
        + `${best % columns}, weight ${written(looked.global[best])}.`);
    }
    who.setAttribute("aria-label",
      `The photograph, with the token at row ${row}, column ${column}.`);
    page.all(".scale span").forEach((place, i) => {
      place.textContent = tops[i] === undefined ? "" : written(tops[i]);
    });
    page.say(`Token at row ${row}, column ${column}. ${local.ariaLabel} ${global.ariaLabel}`);
  }

  function draw() {
    if (!looked || !page.photo || !page.ran) return;
    const { photo } = page;
    const { rows, columns, window: [h, w], windows } = page.layer();
    const { row, column, top, left } = page.token();
    const { width, height } = photo;
    const [whole, place] = [[0, 0, width, height], [row % h, column % w]];
    const isOneOfMany = windows[0] * windows[1] > 1;
    who.style.aspectRatio = global.style.aspectRatio = `${width} / ${height}`;
    local.style.aspectRatio = `${(w * width) / columns} / ${(h * height) / rows}`;

    let [context, wide, high, ratio] = cleared(who);
    const cell = [high / rows, wide / columns];
    drawOver(context, photo, whole, null, wide, high);
    drawGrid(context, [h * cell[0], w * cell[1]], ratio);
    drawFrame(context, place, [high / h, wide / w], settings.global, 3 * ratio);
    if (isOneOfMany) {
      drawFrame(context, [top, left], [h * cell[0], w * cell[1]], settings.local, ratio);
    }
    const inset = cell[1] < 24 * ratio ? 0 : 6 * ratio;
    drawFrame(context, [row, column], cell, settings.local, 3 * ratio, inset);

    [context, wide, high, ratio] = cleared(local);
    const [down, right] = [height / rows, width / columns];
    const part = [left * w * right, top * h * down, w * right, h * down];
    const heat = heatmap({ rows: h, columns: w, values: looked.local }, page.colors);
    drawOver(context, photo, part, heat, wide, high);
    drawFrame(context, place, [high / h, wide / w], settings.local, 3 * ratio);

    [context, wide, high, ratio] = cleared(global);
    const everywhere = looked.global
      && heatmap({ rows, columns, values: looked.global }, page.colors);
    drawOver(context, photo, whole, everywhere, wide, high);
    const window = [(h * high) / rows, (w * wide) / columns];
    drawGrid(context, window, ratio);
    if (isOneOfMany) drawFrame(context, [top, left], window, settings.local, 2 * ratio);
  }

  // Controls.

  function enter(level) {
    state.level = level;
    const { depth, heads: count } = page.made.levels[level];
    [0, 1].forEach((kind) => {
      const numbers = Array.from({ length: depth }, (_, j) => j).filter((j) => j % 2 === kind);
      fill(blocks[kind], numbers.map((j) => [j, `block ${j}`]));
      fill(heads[kind], [[-1, `mean of ${count} heads`],
        ...Array.from({ length: count }, (_, head) => [head, `head ${head}`])]);
      blocks[kind].disabled = heads[kind].disabled = !numbers.length;
    });
    syncHeads();
  }

  function fillLevels() {
    const holder = page.find(".levels");
    holder.querySelectorAll("label").forEach((label) => label.remove());
    page.made.levels.forEach((_, i) => {
      const label = add(holder, "label");
      const input = add(label, "input", "", {
        type: "radio", name: `level-${page.group}`, value: i, checked: !i,
      });
      add(label, "span", i + 1);
      input.addEventListener("change", () => page.inTurn(async () => {
        enter(i);
        await page.tell("level");
        await look();
      }));
    });
    enter(0);
  }

  const blockName = (kind) => `levels.${state.level}.blocks.${blocks[kind].value}`;

  /** Show whether the chosen head is switched off; the mean is no head. */
  function syncHeads() {
    offHeads.forEach((box, kind) => {
      const head = Number(heads[kind].value);
      box.disabled = head < 0 || heads[kind].disabled;
      box.checked = (state.off[blockName(kind)] ?? []).includes(head);
    });
  }

  offHeads.forEach((box, kind) => box.addEventListener("change", () => {
    const { [blockName(kind)]: before = [], ...others } = state.off;
    const head = Number(heads[kind].value);
    const after = before.filter((one) => one !== head);
    if (box.checked) after.push(head);
    state.off = after.length ? { ...others, [blockName(kind)]: after } : others;
    page.switched(box);
  }));
  for (const select of [...blocks, ...heads]) {
    select.addEventListener("change", () => {
      syncHeads();
      page.inTurn(look, "look");
    });
  }

  // Pointing.

  function partOf(event, canvas) {
    const box = canvas.getBoundingClientRect();
    return [
      (event.clientY - box.top) / box.height,
      (event.clientX - box.left) / box.width,
    ].map((value) => Math.max(0, Math.min(0.999, value)));
  }

  function point(event, canvas) {
    if (!page.ran) return;
    const part = partOf(event, canvas);
    const { rows, columns, window: [h, w] } = page.layer();
    const { top, left } = page.token();
    [state.y, state.x] = canvas === local
      ? [((top + part[0]) * h) / rows, ((left + part[1]) * w) / columns].map((x) =>
        Math.min(x, 0.999))
      : part;
    page.inTurn(look, "look");
  }

  /** Tell which key of the token's window the pointer is over, if it is over one. */
  function hover(event, canvas) {
    if (!page.ran || canvas === who) return;
    const { rows, columns, window: [h, w] } = page.layer();
    const { top, left } = page.token();
    const [down, right] = partOf(event, canvas);
    const [i, j] = canvas === local ? [Math.floor(down * h), Math.floor(right * w)]
      : [Math.floor(down * rows) - top * h, Math.floor(right * columns) - left * w];
    if (i >= 0 && i < h && j >= 0 && j < w) {
      page.tell("pointed", [Number(canvas === global), i * w + j]);
    }
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
      else hover(event, canvas);
    });
    view.addEventListener("click", (event) => point(event, canvas));
  }

  page.find(".who").addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[
      event.key
    ];
    if (!step || !page.ran || event.altKey || event.ctrlKey || event.metaKey) return;
    // The page must not scroll, and the book must not turn the page.
    event.preventDefault();
    event.stopPropagation();
    const { rows, columns, window } = page.layer();
    const { row, column } = page.token();
    const [down, right] = event.shiftKey ? window : [1, 1];
    const within = (value, side) => (Math.max(0, Math.min(side - 1, value)) + 0.5) / side;
    state.y = within(row + step[0] * down, rows);
    state.x = within(column + step[1] * right, columns);
    page.inTurn(look);
  });

  const ramp = `linear-gradient(to right, ${settings.heat.join(", ")})`;
  page.all(".scale i").forEach((bar) => {
    bar.style.background = ramp;
  });
  for (const kind of ["local", "global"]) {
    page.find(`.key .${kind}`).style.borderColor = settings[kind];
  }
  new ResizeObserver(draw).observe(page.find(".panes.attention"));
  return { loaded: fillLevels, ran: look, reset: syncHeads };
}
