"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");
  const views = [...document.querySelectorAll("section[data-view]")];
  const index = JSON.parse(document.getElementById("index").textContent);
  const input = document.getElementById("search");
  const hits = document.getElementById("hits");

  // Routing: #method-ems and #compare-decoding open their own view; anything else is a place on the first one.
  function route() {
    const name = decodeURIComponent(location.hash.slice(1)) || "home";
    const view = views.find((v) => v.dataset.view === name) || views[0];
    for (const v of views) v.classList.toggle("open", v === view);
    if (view !== views[0]) { scrollTo(0, 0); view.focus({ preventScroll: true }); }
    else if (name !== "home") document.getElementById(name)?.scrollIntoView();
    else scrollTo(0, 0);
  }
  addEventListener("hashchange", route);
  route();

  // Search: every word must be found (whole, as a beginning, or with one or two letters wrong).
  const documents = index.map((m) => ({ ...m, words: m.text.split(/[^a-z0-9]+/).filter(Boolean) }));
  const frequency = new Map();
  for (const d of documents) for (const w of new Set(d.words)) frequency.set(w, (frequency.get(w) || 0) + 1);
  const small = new Set("a an and are as by can for from how i in is it my of on or so the to want we what with without you your".split(" "));

  function distance(a, b, most) {
    if (Math.abs(a.length - b.length) > most) return most + 1;
    let row = Array.from({ length: b.length + 1 }, (_, i) => i);
    for (let i = 1; i <= a.length; i++) {
      const next = [i];
      for (let j = 1; j <= b.length; j++) next[j] = Math.min(row[j] + 1, next[j - 1] + 1, row[j - 1] + (a[i - 1] !== b[j - 1]));
      row = next;
    }
    return row[b.length];
  }
  function closeness(query, word) {
    if (query === word) return 1;
    if (query.length > 2 && (word.startsWith(query) || (word.length > 3 && query.startsWith(word)))) return 0.8;
    if (query.length > 4 && distance(query, word, 2) <= (query.length > 7 ? 2 : 1)) return 0.6;
    return 0;
  }
  function find(text) {
    const words = text.toLowerCase().split(/[^a-z0-9]+/).filter((w) => w && !small.has(w));
    if (!words.length) return [];
    const scored = documents.map((d) => {
      let score = 0;
      for (const q of words) {
        let best = 0, count = 0;
        for (const w of d.words) {
          const near = closeness(q, w);
          if (near) { count += near; best = Math.max(best, near * Math.log(1 + documents.length / frequency.get(w))); }
        }
        score += best * (1 + Math.log(1 + count) / 2);
      }
      return { ...d, score };
    });
    return scored.filter((d) => d.score > 0).sort((a, b) => b.score - a.score).slice(0, 6);
  }
  let current = -1;
  function mark(position) {
    const links = [...hits.querySelectorAll("a")];
    if (!links.length) return;
    current = (position + links.length) % links.length;
    links.forEach((a, i) => a.classList.toggle("current", i === current));
  }
  input.addEventListener("input", () => {
    const found = find(input.value);
    current = -1;
    hits.replaceChildren(...found.map((d) => {
      const item = document.createElement("li"), link = document.createElement("a"), name = document.createElement("b"), does = document.createElement("small");
      link.href = `#method-${d.slug}`;
      name.textContent = d.title;
      does.textContent = ` ${d.does}`;
      link.append(name, does);
      item.append(link);
      return item;
    }));
    if (input.value.trim() && !found.length) hits.innerHTML = "<li><small>Nothing fits. All methods stand below.</small></li>";
    if (found.length) mark(0);
  });
  input.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown") { mark(current + 1); event.preventDefault(); }
    if (event.key === "ArrowUp") { mark(current - 1); event.preventDefault(); }
    if (event.key === "Enter") hits.querySelector("a.current")?.click();
    if (event.key === "Escape") { input.value = ""; hits.replaceChildren(); }
  });
  addEventListener("keydown", (event) => {
    if (event.key === "/" && document.activeElement !== input && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      location.hash = "home";
      input.focus();
    }
  });

  // Sort a table by the column whose head is pressed.
  for (const table of document.querySelectorAll("table.results")) {
    table.querySelectorAll("thead button").forEach((button, column) => button.addEventListener("click", () => {
      const up = button.dataset.up !== "true";
      button.dataset.up = up;
      const value = (row) => { const c = row.children[column]; return c.dataset.sort === undefined ? c.textContent.trim() : c.dataset.sort === "" ? NaN : Number(c.dataset.sort); };
      const body = table.tBodies[0];
      body.append(...[...body.rows].sort((a, b) => {
        const x = value(a), y = value(b);
        if (Number.isNaN(x)) return 1;
        if (Number.isNaN(y)) return -1;
        return (x > y ? 1 : x < y ? -1 : 0) * (up ? 1 : -1);
      }));
    }));
  }
  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(button.nextElementSibling.textContent);
      button.textContent = "copied";
      setTimeout(() => { button.textContent = "copy"; }, 1200);
    });
  }
  document.getElementById("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
})();
