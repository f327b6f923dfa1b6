"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const bytes = Uint8Array.from(atob(data.expiry), (c) => c.charCodeAt(0));
const ends = new Uint32Array(bytes.buffer);
const [L, H, T] = [data.layers.length, data.heads, data.tokens.length];
const NEVER = 0xffffffff;
const at = (id) => document.getElementById(id);
const end = (layer, head, token) => ends[(layer * H + head) * T + token];
const state = { time: T - 1, layer: -1, head: -1, hover: -1, timer: 0 };
const chosen = () => {
  const pairs = [];
  for (let l = 0; l < L; l++) for (let h = 0; h < H; h++)
    if ((state.layer < 0 || state.layer === l) && (state.head < 0 || state.head === h)) pairs.push([l, h]);
  return pairs;
};
const share = (token, time, pairs) =>
  pairs.reduce((sum, [l, h]) => sum + (token <= time && time < end(l, h, token)), 0) / pairs.length;

document.title = at("title").textContent = data.title;
at("about").textContent = data.about;
const spans = data.tokens.map((token, index) => {
  const span = document.createElement("span");
  span.textContent = token;
  span.addEventListener("mouseenter", () => hover(index));
  span.addEventListener("mouseleave", () => hover(-1));
  span.addEventListener("click", () => show({ time: index }));
  return span;
});
at("text").append(...spans);

const buttons = [];
function makeButton(cell, label, layer, head) {
  const button = document.createElement("button");
  button.type = "button";
  button.title = label;
  button.addEventListener("click", () => {
    const same = state.layer === layer && state.head === head;
    show(same ? { layer: -1, head: -1 } : { layer, head });
  });
  buttons.push({ button, layer, head });
  cell.append(button);
}
data.layers.forEach((name, layer) => {
  const row = at("heads").insertRow();
  row.insertCell().textContent = `layer ${name}`;
  for (let head = 0; head < H; head++) makeButton(row.insertCell(), `layer ${name}, head ${head}`, layer, head);
});

function paintText() {
  const pairs = chosen();
  spans.forEach((span, token) => {
    const part = share(token, state.time, pairs);
    span.style.backgroundColor = part ? `rgba(var(--keep), ${0.08 + 0.5 * part})` : "";
    span.className = token > state.time ? "future" : part ? "" : "gone";
    if (token === state.time) span.classList.add("now");
    if (token === state.hover) span.classList.add("hover");
  });
  for (const { button, layer, head } of buttons) {
    let count = 0;
    for (let token = 0; token <= state.time; token++) count += state.time < end(layer, head, token);
    button.textContent = count;
    button.setAttribute("aria-pressed", String(state.layer === layer && state.head === head));
  }
}

const canvas = at("lives"), pen = canvas.getContext("2d"), picture = document.createElement("canvas");
function drawLives() {
  // One pixel per (token, time), drawn once per choice of heads, then scaled.
  picture.width = picture.height = T;
  const image = picture.getContext("2d").createImageData(T, T), pairs = chosen();
  const ink = getComputedStyle(document.documentElement).getPropertyValue("--keep").split(",").map(Number);
  for (let token = 0; token < T; token++) {
    const row = new Float32Array(T + 1);
    for (const [l, h] of pairs) { row[token] += 1; row[Math.min(end(l, h, token), T)] -= 1; }
    for (let time = token, held = 0; time < T; time++) {
      held += row[time];
      image.data.set([...ink, 255 * held / pairs.length], 4 * (token * T + time));
    }
  }
  picture.getContext("2d").putImageData(image, 0, 0);
}
function paintLives() {
  const scale = canvas.width / T;
  pen.imageSmoothingEnabled = scale < 1;
  pen.clearRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
  pen.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--mark");
  pen.fillRect((state.time + 0.5) * scale - 1, 0, 2, canvas.height);
  if (state.hover >= 0) pen.fillRect(0, (state.hover + 0.5) * scale - 1, canvas.width, 2);
}

function describe(token) {
  if (token < 0) return "Hover over a token, or over the picture; click to move the time. Click a head to see it alone.";
  const lives = chosen().map(([l, h]) => end(l, h, token));
  const gone = lives.filter((life) => life !== NEVER && life <= state.time).length;
  const first = Math.min(...lives);
  const fate = first >= T ? "never evicted" : `first evicted after token ${first - 1}`;
  return `token ${token} "${data.tokens[token].trim()}": ${fate}; now gone from ${gone} of ${lives.length} heads`;
}
function hover(token) {
  if (state.hover >= 0) spans[state.hover].classList.remove("hover");
  state.hover = token;
  if (token >= 0) spans[token].classList.add("hover");
  at("note").textContent = describe(token);
  paintLives();
}
function show(change) {
  const heads = "layer" in change;
  Object.assign(state, change);
  at("time").value = state.time;
  at("clock").textContent = `${state.time + 1} of ${T} tokens read`;
  if (heads) drawLives();
  paintText();
  paintLives();
  at("note").textContent = describe(state.hover);
}
const place = (event) => {
  const box = canvas.getBoundingClientRect(), clip = (x) => Math.max(0, Math.min(T - 1, Math.floor(x * T)));
  return [clip((event.clientX - box.left) / box.width), clip((event.clientY - box.top) / box.height)];
};
canvas.addEventListener("mousemove", (event) => hover(place(event)[1]));
canvas.addEventListener("mouseleave", () => hover(-1));
canvas.addEventListener("click", (event) => show({ time: place(event)[0] }));
at("time").max = T - 1;
at("time").addEventListener("input", (event) => show({ time: Number(event.target.value) }));
at("play").addEventListener("click", () => {
  clearInterval(state.timer);
  const going = at("play").textContent === "play";
  at("play").textContent = going ? "stop" : "play";
  if (!going) return;
  if (state.time >= T - 1) show({ time: 0 });
  state.timer = setInterval(() => {
    if (state.time >= T - 1) at("play").click();
    else show({ time: state.time + 1 });
  }, Math.max(15, 12000 / T));
});
show({ layer: -1, head: -1 });
