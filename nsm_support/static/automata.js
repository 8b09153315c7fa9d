/* Steps a string through a learned automaton and the true one, side by side. Without an .nsm-stepper it does nothing. */
(function () {
  function run(machine, tokens) {
    let state = machine.start;
    const states = [state];
    for (const token of tokens) states.push((state = machine.transition[state][token]));
    return states;
  }

  function start(figure) {
    figure.classList.add("nsm-ready-stepper");
    const pairs = JSON.parse(figure.querySelector(".nsm-machines").textContent);
    const part = (role) => figure.querySelector(`[data-role="${role}"]`);
    const choice = part("pair"), field = part("string"), message = part("message");
    for (const hidden of figure.querySelectorAll(".nsm-needs-script")) hidden.hidden = false;

    function words(pair, side, tokens) {
      const machine = pair[side], states = run(machine, tokens), output = machine.output[states[states.length - 1]];
      return `state ${states[states.length - 1]}, ` + (pair.acceptor ? (output ? "accepts" : "rejects") : `output ${output}`);
    }

    function draw() {
      const pair = pairs[choice.value];
      const typed = [...field.value], known = typed.filter((c) => /[0-9]/.test(c) && Number(c) < pair.tokens);
      if (known.length !== typed.length) field.value = known.join("");
      const tokens = known.map(Number);
      for (const one of figure.querySelectorAll(".nsm-pair")) one.hidden = one.dataset.pair !== choice.value;
      const shown = figure.querySelector(`.nsm-pair[data-pair="${choice.value}"]`);
      const [yes, no] = ["true", "learned"].map((side) => run(pair[side], tokens));
      for (const [side, states] of [["true", yes], ["learned", no]])
        for (const state of shown.querySelectorAll(`[data-side="${side}"] .nsm-state`))
          state.classList.toggle("nsm-here", Number(state.dataset.state) === states[states.length - 1]);
      const parts = yes.findIndex((state, i) => pair.true.output[state] !== pair.learned.output[no[i]]);
      shown.classList.toggle("nsm-parted", parts >= 0);
      const after = tokens.length ? `After ${known.join("")}` : "Before the first token";
      const verdict = parts < 0 ? "They have agreed at every step." :
        parts === 0 ? "They differ before the first token." : `They first differed after ${known.slice(0, parts).join("")}.`;
      message.textContent = `${known.length === typed.length ? "" : `Tokens are 0 to ${pair.tokens - 1}. `}` +
        `${after}: true ${words(pair, "true", tokens)}; learned ${words(pair, "learned", tokens)}. ${verdict}`;
      part("example").disabled = pair.example === null;
      part("example").textContent = pair.example === null ? "they never part" : "where they part";
      for (const key of figure.querySelectorAll("[data-token]")) key.hidden = Number(key.dataset.token) >= pair.tokens;
    }

    choice.addEventListener("change", () => { field.value = ""; draw(); });
    field.addEventListener("input", draw);
    part("back").addEventListener("click", () => { field.value = field.value.slice(0, -1); draw(); });
    part("example").addEventListener("click", () => { field.value = pairs[choice.value].example.join(""); draw(); });
    for (const key of figure.querySelectorAll("[data-token]"))
      key.addEventListener("click", () => { field.value += key.dataset.token; draw(); });
    draw();
  }

  const all = () => document.querySelectorAll(".nsm-stepper:not(.nsm-ready-stepper)").forEach(start);
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", all);
  else all();
})();
