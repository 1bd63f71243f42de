/** The switches, and the reader's predictions of what they do. */

const NOTABLE = 0.01; // a change of a probability that is not called a change

/** The outcomes that a reader may predict for the first class; just one of them comes true. */
const OUTCOMES = {
  stays: (name) => `${name} stays first, within one point`,
  gains: (name) => `${name} stays first and gains`,
  loses: (name) => `${name} stays first and loses`,
  falls: () => "another class wins",
};

/** Return the outcome of a switch from the probabilities before it and after it. */
function outcomeOf(before, after) {
  const first = strongest(before);
  if (strongest(after) !== first) return "falls";
  const change = after[first] - before[first];
  if (Math.abs(change) < NOTABLE) return "stays";
  return change > 0 ? "gains" : "loses";
}

function switchPanel(page) {
  const { state } = page;
  const form = page.find(".switches");
  const [question, options, verdict, predict] = [".question", ".outcomes", ".verdict", ".predict"]
    .map(page.find);
  const named = [...form.elements].filter((control) => control.name);
  const field = Object.fromEntries(named.map((control) => [control.name, control]));
  const score = { right: 0, all: 0 };
  let setting, thrownBy;

  /** Read the switches that are not as the model was trained. */
  page.switches = () => {
    const [query, level] = [field.query.value, field.level.value];
    const chosen = {};
    if (query !== "own") {
      chosen.query = query === "other" || level === "" ? query : { [level]: query };
    }
    if (field.gates.value !== "own") chosen.gates = field.gates.value;
    if (field.part.checked) chosen.part = { [page.made.late]: page.made.parts };
    if (field.bias.checked) chosen.bias = "off";
    for (const fault of ["flatGather", "zeroPadding"]) {
      if (field[fault].checked) chosen[fault] = true;
    }
    if (Object.keys(state.off).length) chosen.headsOff = state.off;
    return chosen;
  };
  const text = () => JSON.stringify(page.switches());
  page.isSwitched = () => text() !== "{}";

  const isBox = (control) => control.type === "checkbox";
  const remember = () => {
    setting = {
      off: state.off,
      values: Object.values(field).map((x) => (isBox(x) ? x.checked : x.value)),
      text: text(),
    };
  };

  function putBack() {
    state.off = setting.off;
    Object.values(field).forEach((control, i) => {
      control[isBox(control) ? "checked" : "value"] = setting.values[i];
    });
    page.tell("reset");
  }

  /** Show or hide the question; while it stands, no other switch can be thrown. */
  function ask(isOpen) {
    question.hidden = !isOpen;
    page.find(".controls").disabled = isOpen;
    page.all(".off-head").forEach((box) => (box.disabled = isOpen));
    if (isOpen) options.querySelector("button").focus();
    else page.tell("reset");
  }

  function withdraw() {
    if (question.hidden) return;
    putBack();
    ask(false);
  }

  async function settle(predicted) {
    const before = page.ran.now.probabilities;
    ask(false);
    thrownBy.focus({ preventScroll: true });
    await page.run();
    const after = page.ran.now.probabilities;
    const [first, best] = [strongest(before), strongest(after)];
    const outcome = outcomeOf(before, after);
    score.all++;
    score.right += outcome === predicted;
    const { classes } = page.made;
    verdict.textContent = `${outcome === predicted ? "Right" : "No"}: `
      + `${outcome === "falls" ? `${classes[best]} wins` : OUTCOMES[outcome](classes[first])}. `
      + `${classes[first]}: ${percent(before[first])}, now ${percent(after[first])} `
      + `(${points(after[first] - before[first])} points). `
      + `Your score: ${score.right} of ${score.all}.`;
  }

  /** Throw the switch that was set, or first ask what it will do. */
  page.switched = (control) => {
    if (!predict.checked || !page.ran || text() === setting.text) {
      page.inTurn(page.run);
      return;
    }
    thrownBy = control;
    const first = page.made.classes[strongest(page.ran.now.probabilities)];
    options.replaceChildren();
    for (const [outcome, phrase] of Object.entries(OUTCOMES)) {
      add(options, "button", phrase(first), { type: "button" })
        .addEventListener("click", () => page.inTurn(() => settle(outcome)));
    }
    ask(true);
  };

  page.find(".withdraw").addEventListener("click", () => {
    withdraw();
    thrownBy.focus();
  });
  predict.addEventListener("change", withdraw);
  form.addEventListener("change", ({ target }) => page.switched(target));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => {
    state.off = {};
    // The fields change after this event.
    setTimeout(() => {
      page.tell("reset");
      page.inTurn(page.run);
    });
  });

  return {
    loaded() {
      const { made } = page;
      state.off = {};
      for (const control of Object.values(field)) {
        if (isBox(control)) control.checked = false;
        else control.selectedIndex = 0;
      }
      fill(field.level, [["", "all levels"],
        ...made.levels.map((_, i) => [`levels.${i}`, `level ${i + 1}`])]);
      const late = made.levels.findIndex(({ window }) =>
        window.some((side, axis) => side > made.parts[axis]));
      made.late = `levels.${late}`;
      field.part.closest(".switch").hidden = late < 0;
      page.find(".parts").textContent =
        `windows of level ${late + 1} in parts of ${made.parts.join(" × ")}`;
    },
    photograph: withdraw,
    ran() {
      field.query.querySelector("[value=other]").disabled = !page.ran.hasOther;
      remember();
    },
  };
}
