"use strict";
// Model texts are untrusted: they become text nodes (textContent), never markup.
(function () {
  const $ = (id) => document.getElementById(id);
  const make = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };

  // Theme: auto follows the system; the choice is kept where the browser allows it.
  const themes = ["auto", "light", "dark"];
  const remembered = () => { try { return localStorage.getItem("convergent-theme"); } catch (e) { return null; } };
  let theme = themes.includes(remembered()) ? remembered() : "auto";
  const applyTheme = () => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    $("theme").lastElementChild.textContent = theme;
  };
  $("theme").hidden = false;
  $("theme").addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    try { localStorage.setItem("convergent-theme", theme); } catch (e) { /* a page from a file may not store */ }
    applyTheme();
  });
  applyTheme();

  // Long chapters are closed on phones; whatever is linked to opens, and the menu closes behind its link.
  if (matchMedia("(max-width: 760px)").matches) document.querySelectorAll("details[data-long]").forEach((d) => { d.open = false; });
  const reveal = () => {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    if (!target) return;
    let moved = false;
    const open = (d) => { if (!d.open) { d.open = true; moved = true; } };
    for (let d = target.closest("details"); d; d = d.parentElement.closest("details")) open(d);
    const own = target.querySelector(":scope > details.chapter");
    if (own) open(own);
    if (moved) target.scrollIntoView();
  };
  addEventListener("hashchange", reveal);
  reveal();
  $("menu").addEventListener("click", (e) => { if (e.target.tagName === "A") $("menu").open = false; });
  addEventListener("keydown", (e) => { if (e.key === "Escape" && $("menu").open) { $("menu").open = false; $("menu").firstElementChild.focus(); } });
  addEventListener("click", (e) => { if (!$("menu").contains(e.target)) $("menu").open = false; });

  // What hides behind <details> belongs on paper too, but for a figure's table: the numbers stand at the end.
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open]):not(.picker):not(#menu):not(figure details)")];
    closed.forEach((d) => { d.open = true; });
  });
  addEventListener("afterprint", () => closed.forEach((d) => { d.open = false; }));

  // Answers
  const data = JSON.parse($("data").textContent);
  if (!data.answers.length) return;
  const [CONDITION, QUESTION, WORDING, ALIGNED, COHERENT, REASON, EM, INCOHERENT, CUT, TEXT] = data.answers[0].keys();
  const PER_PAGE = matchMedia("(max-width: 760px)").matches ? 2 : 3;
  const filters = {
    all: () => true,
    em: (a) => a[EM],
    below50: (a) => a[ALIGNED] !== null && a[ALIGNED] < 50,
    above70: (a) => a[ALIGNED] !== null && a[ALIGNED] > 70,
    incoherent: (a) => a[INCOHERENT],
    none: (a) => a[ALIGNED] === null || a[COHERENT] === null,
  };
  const orders = {
    drawn: null,
    low: (a, b) => (a[ALIGNED] ?? 999) - (b[ALIGNED] ?? 999),
    high: (a, b) => (b[ALIGNED] ?? -1) - (a[ALIGNED] ?? -1),
  };
  let page = 0;

  const option = (value, label) => { const o = make("option", "", label); o.value = value; return o; };
  $("question").append(option("all", "all questions"), ...data.questions.map((q, i) => option(String(i), q.replaceAll("_", " "))));
  $("question").value = data.questions.length > 1 ? "0" : "all";

  const groups = new Map();
  data.conditions.forEach(([label, group, role], i) => {
    if (!groups.has(group)) {
      const set = make("fieldset");
      set.append(make("legend", "", group.charAt(0).toUpperCase() + group.slice(1)));
      groups.set(group, set);
      $("boxes").append(set);
    }
    const box = make("input");
    box.type = "checkbox";
    box.value = i;
    const row = make("label");
    row.append(box, make("span", "", role === "control" ? label + " (control)" : label));
    groups.get(group).append(row);
  });
  const boxes = [...$("boxes").querySelectorAll("input")];
  // To begin with: baseline, first organism, its first ablation and the first control of that.
  const first = (group, role) => data.conditions.findIndex((c) => c[1] === group && c[2] === role);
  [first("plain", "baseline"), first("plain", "real"), first("ablation", "real"), first("ablation", "control")]
    .filter((i) => i >= 0).forEach((i) => { boxes[i].checked = true; });
  if (!boxes.some((b) => b.checked)) boxes.slice(0, 3).forEach((b) => { b.checked = true; });

  const score = (value) => (value === null ? "not scored" : value.toFixed(1));
  function card(a) {
    const node = make("article", "answer");
    node.append(make("p", "asked", data.wordings[a[WORDING]]));
    const said = make("p", "said", a[TEXT] || "(empty)");
    said.dir = "auto";
    const scores = make("p", "scores");
    scores.append(make("span", "", "alignment " + score(a[ALIGNED])), make("span", "", "coherence " + score(a[COHERENT])));
    if (a[EM]) scores.append(make("span", "flag", "EM"));
    if (a[REASON]) scores.append(make("span", "", a[REASON]));
    if (a[CUT]) scores.append(make("span", "", "cut at the token limit"));
    node.append(said, scores);
    return node;
  }

  function show() {
    const question = $("question").value;
    const picked = boxes.filter((b) => b.checked).map((b) => Number(b.value));
    const order = orders[$("order").value];
    const columns = picked.map((c) => {
      const list = data.answers.filter((a) =>
        a[CONDITION] === c && (question === "all" || a[QUESTION] === Number(question)) && filters[$("score").value](a));
      return order ? list.sort(order) : list;
    });
    const pages = Math.max(1, Math.ceil(Math.max(0, ...columns.map((c) => c.length)) / PER_PAGE));
    page = Math.min(page, pages - 1);
    $("columns").replaceChildren(...columns.map((list, k) => {
      const [label, , role] = data.conditions[picked[k]];
      const column = make("div", "column " + role);
      column.append(make("h3", "", label + (role === "control" ? " (control)" : "")));
      const part = list.slice(page * PER_PAGE, (page + 1) * PER_PAGE);
      column.append(...(part.length ? part.map(card) : [make("p", "empty", list.length ? "no more answers" : "no such answer")]));
      return column;
    }));
    $("chosen").textContent = picked.length ? picked.length + " of " + boxes.length + " side by side" : "none chosen";
    $("count").textContent = columns.map((c) => c.length).reduce((a, b) => a + b, 0) + " answers match.";
    $("page").textContent = "Page " + (page + 1) + " of " + pages;
    $("previous").disabled = page === 0;
    $("next").disabled = page >= pages - 1;
  }
  const restart = () => { page = 0; show(); };
  ["question", "score", "order"].forEach((id) => $(id).addEventListener("change", restart));
  $("boxes").addEventListener("change", restart);
  $("previous").addEventListener("click", () => { page -= 1; show(); });
  $("next").addEventListener("click", () => { page += 1; show(); });
  $("browser").hidden = false;
  show();
})();
