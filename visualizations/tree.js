// Draws the passes of a drafting run, one at a time, from the JSON of `.x-tree[data-drafts]`; after
// view.js, in a function of its own. Texts of the model only go through textContent.
const SVG = 'http://www.w3.org/2000/svg';
const SYMBOLS = { a: '✓', r: '✕', x: '+' };
const SECONDS = 0.5;  // a pass, while playing
const [NARROW, WIDE, GAP] = [106, 124, 17];  // px: of a level with the gap behind it
const LAST = 176;  // px: the model’s own token with its label, as in tree.css
let passes = [];
let drawn = '';  // the JSON of `passes`
let at = 0;
let timer = null;
const root = () => element.querySelector('.x-tree[data-drafts]');

function make(parent, tag, className, text) {
  const made = parent.appendChild(document.createElement(tag));
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Spaces at the ends of a token as quiet dots, as everywhere.
function word(parent, text) {
  const [, lead, core, tail] = /^( *)(.*?)( *)$/s.exec(text);
  const box = make(parent, 'span', 'w');
  for (const _ of lead) make(box, 'i', 'sp', ' ');
  box.append(core);
  for (const _ of tail) make(box, 'i', 'sp', ' ');
}

const known = (value) => value !== null && value !== undefined;
const percent = (p) => (
  p === 0 ? '0' : p < 0.001 ? '<0.1' : p >= 0.9995 && p < 1 ? '>99.9'
    : (100 * p).toFixed(p < 0.095 || (p >= 0.985 && p < 1) ? 1 : 0)
);
const counted = (n, thing) => `${n.toLocaleString('en')} ${thing}${n === 1 ? '' : 's'}`;

// ---- where the nodes stand ------------------------------------------------------------------

// Nodes of a pass: the root, its drafts, and the model's own token at the end of the path.
function nodesOf(pass) {
  const path = pass.path || [];
  const nodes = (pass.t || []).map((text, i) => ({
    text, kind: pass.s[i], p: pass.p?.[i], q: pass.q?.[i], chance: pass.c?.[i], coin: pass.k?.[i],
    value: pass.v?.[i], up: pass.up[i], chip: pass.chip?.includes(i), children: [],
  }));
  path.forEach((node, i) => { nodes[node].go = pass.at + i; });
  const start = { text: pass.root, kind: 'root', children: [], depth: 0 };
  for (const node of nodes) {
    node.parent = node.up < 0 ? start : nodes[node.up];
    node.depth = node.parent.depth + 1;
    node.parent.children.push(node);
  }
  const last = path.length ? nodes[path[path.length - 1]] : start;
  if (pass.x !== undefined || pass.o) {
    const own = { text: pass.x || '', kind: 'x', label: pass.o, children: [], parent: last };
    own.go = pass.at + path.length;
    own.depth = last.depth + 1;
    last.children.push(own);
    nodes.push(own);
  }
  return [start, ...nodes];
}

// Every leaf has a row of its own; the written path is a straight line. Returns the rows.
function place(start) {
  let rows = 0;
  const walk = (node) => {
    node.children.forEach(walk);
    const written = node.children.find((child) => child.kind === 'a' || child.kind === 'x');
    if (!node.children.length) node.row = rows++;
    else if (written) node.row = written.row;
    else node.row = (node.children[0].row + node.children[node.children.length - 1].row) / 2;
  };
  walk(start);
  return rows;
}

const pitch = (rows) => (rows > 12 ? { row: 28, pill: 24 } : { row: 49, pill: 41 });

// ---- one pass --------------------------------------------------------------------------------

function hover(node, measure) {
  const lines = [`“${node.text}”`];
  if (known(node.p)) lines.push(`p = ${percent(node.p)} % (the model, temperature 1)`);
  if (known(node.q)) lines.push(`q = ${percent(node.q)} % (the drafter)`);
  if (known(node.chance)) {
    const coin = known(node.coin) ? `; the coin fell on ${node.coin}` : '';
    lines.push(`chance of being accepted ${percent(node.chance)} %${coin}`);
  }
  if (known(node.value)) lines.push(`${measure || 'value'}: ${node.value}`);
  lines.push({
    a: 'accepted', r: 'tested and rejected', u: 'never reached: the path ended or went elsewhere',
    x: `the model’s own token (${node.label || ''})`, root: 'the last token before this pass',
  }[node.kind]);
  return lines.join('\n');
}

function pill(sheet, node, size, roomy, measure) {
  const box = make(sheet, 'go' in node ? 'button' : 'div', `node ${node.kind}`);
  if ('go' in node) {
    box.type = 'button';
    box.dataset.go = node.go;
  }
  box.style.left = `${8 + node.depth * size.column}px`;
  box.style.top = `${node.y - size.pill / 2}px`;
  box.style.height = `${size.pill}px`;
  box.title = hover(node, measure);
  const line = make(box, 'span', node.chip ? 'line chip' : 'line');
  if (SYMBOLS[node.kind]) make(line, 'b', '', SYMBOLS[node.kind]);
  if (node.kind === 'root' && !node.text) make(line, 'em', '', 'the prompt');
  else word(line, node.text);
  if (!roomy && node.label) make(line, 'small', '', node.label);
  if (roomy) {
    const p = known(node.p) ? `p ${percent(node.p)}` : '';
    const q = known(node.q) ? `q ${percent(node.q)}` : '';
    const own = node.kind === 'root' ? 'before' : node.label;
    make(box, 'small', '', own || [p, q].filter(Boolean).join(' '));
  }
  for (const name of ['p', 'q']) {
    if (known(node[name])) make(box, 'u', name).style.width = `${100 * node[name]}%`;
  }
}

function edge(svg, node, column) {
  const line = svg.appendChild(document.createElementNS(SVG, 'path'));
  const from = 8 + (node.parent.depth + 1) * column - GAP;
  const to = 8 + node.depth * column;
  const half = (from + to) / 2;
  const [a, b] = [node.parent.y, node.y];
  line.setAttribute('d', `M${from} ${a}C${half} ${a} ${half} ${b} ${to} ${b}`);
  line.setAttribute('class', node.kind);
}

function drawTree(canvas, pass) {
  const nodes = nodesOf(pass);
  const rows = place(nodes[0]);
  const deepest = Math.max(1, ...nodes.map((node) => node.depth));
  const fair = Math.floor((canvas.clientWidth - LAST) / deepest);
  const size = { ...pitch(rows), column: Math.max(NARROW, Math.min(WIDE, fair)) };
  const width = deepest * size.column + LAST;
  const height = 12 + rows * size.row;
  canvas.textContent = '';
  const sheet = make(canvas, 'div', 'sheet');
  sheet.style.width = `${width}px`;
  sheet.style.setProperty('--x-pill', `${size.column - GAP}px`);
  sheet.style.height = `${height}px`;
  const svg = sheet.appendChild(document.createElementNS(SVG, 'svg'));
  svg.setAttribute('width', width);
  svg.setAttribute('height', height);
  svg.setAttribute('aria-hidden', 'true');
  for (const node of nodes) node.y = 6 + (node.row + 0.5) * size.row;
  // What was written lies above the rest.
  const order = { u: 0, r: 1, a: 2, x: 2 };
  const edges = nodes.filter((node) => node.parent);
  edges.sort((one, other) => order[one.kind] - order[other.kind]);
  for (const node of edges) edge(svg, node, size.column);
  for (const node of nodes) pill(sheet, node, size, size.row > 30, pass.m);
  canvas.scrollTop = nodes[0].y - canvas.clientHeight / 2;
  // The end of the path is in sight.
  const end = nodes.findLast((node) => node.kind === 'x' || node.kind === 'a') || nodes[0];
  canvas.scrollLeft = end.depth * size.column + LAST - canvas.clientWidth;
}

function drawContext(box, pass) {
  box.textContent = '';
  make(box, 'span', 'before', pass.before ? `… ${pass.before}` : '');
  for (const node of pass.path || []) make(box, 'span', 'a', pass.t[node]);
  if (pass.x) make(box, 'span', 'x', pass.x);
}

function draw() {
  const tree = root();
  const pass = passes[at];
  if (!tree || !pass) return;
  drawTree(tree.querySelector('.canvas'), pass);
  drawContext(tree.querySelector('.context'), pass);
  const drafts = (pass.t || []).length;
  tree.querySelector('.why').textContent = drafts
    ? `Why it ended there: ${pass.why || 'not said'}.`
    : 'Nothing was drafted: a plain pass wrote one token.';
  const said = [];
  if (drafts) {
    said.push(`accepted ${(pass.path || []).length} of ${counted(drafts, 'draft')}`);
  }
  said.push(`wrote ${counted(pass.n, 'token')}`);
  if (pass.ms?.some((ms) => ms > 0)) {
    const [draft, verify, rest] = pass.ms.map((ms) => ms.toFixed(1));
    said.push(`drafting ${draft} ms, verifying ${verify} ms, rest ${rest} ms`);
  }
  if (known(pass.cost)) said.push(`predicted to take ${pass.cost.toFixed(2)} plain steps`);
  tree.querySelector('.figures').textContent = said.join(' · ');
  const slider = tree.querySelector('input');
  slider.value = at;
  const which = `pass ${(at + 1).toLocaleString('en')} of ${passes.length.toLocaleString('en')}`;
  slider.setAttribute('aria-valuetext', which);
  tree.querySelector('output').textContent = which;
  const [back, , on] = tree.querySelectorAll('button[data-move], button[data-play]');
  back.disabled = at === 0;
  on.disabled = at === passes.length - 1;
  tree.querySelector('[data-play]').textContent = timer ? '❚❚ Pause' : '▶ Play';
  const bars = tree.querySelector('.passes');
  bars.querySelector('.on')?.classList.remove('on');
  const bar = bars.children[at];
  bar.classList.add('on');
  const from = bar.offsetLeft - bars.scrollLeft;
  if (from < 0 || from > bars.clientWidth - 20) {
    bars.scrollLeft = bar.offsetLeft - bars.clientWidth / 2;
  }
}

// ---- all passes ------------------------------------------------------------------------------

const wasted = (pass) => (pass.t || []).length - (pass.path || []).length;

function drawStrip(tree) {
  const most = Math.max(...passes.map((pass) => pass.n));
  const waste = Math.max(...passes.map(wasted));
  const bars = tree.querySelector('.passes');
  bars.textContent = '';
  passes.forEach((pass, i) => {
    const bar = make(bars, 'i');
    bar.dataset.step = i;
    bar.style.setProperty('--n', pass.n / most);
    bar.style.setProperty('--w', waste ? wasted(pass) / waste : 0);
    const lost = counted(wasted(pass), 'draft');
    bar.title = `pass ${i + 1}: ${counted(pass.n, 'token')}, ${lost} wasted`;
  });
  tree.querySelector('.up').textContent = `▲ tokens written, up to ${most}`;
  tree.querySelector('.down').textContent = `▼ drafts wasted, up to ${waste}`;
  // One height for all passes, so that the page stands still while they play.
  const heights = passes.map((pass) => {
    const rows = place(nodesOf(pass)[0]);
    return 14 + rows * pitch(rows).row;
  });
  tree.querySelector('.canvas').style.height = `${Math.min(Math.max(...heights) + 12, 440)}px`;
}

function show() {
  const tree = root();
  if (!tree) {
    stop();
    passes = [];
    drawn = '';
    return;
  }
  if (tree.dataset.drafts !== drawn) {
    stop();
    drawn = tree.dataset.drafts;
    passes = JSON.parse(drawn);
    at = 0;
  }
  drawStrip(tree);
  draw();
}

function go(to) {
  at = Math.max(0, Math.min(passes.length - 1, to));
  draw();
}

function stop() {
  clearInterval(timer);
  timer = null;
}

function play() {
  if (at === passes.length - 1) at = 0;
  timer = setInterval(() => {
    if (!element.isConnected || at >= passes.length - 1) stop();
    else at += 1;
    draw();
  }, 1000 * SECONDS);
  draw();
}

element.addEventListener('click', (event) => {
  const hit = event.target.closest('.x-tree [data-step],.x-tree [data-move],.x-tree [data-play]');
  if (!hit) return;
  const playing = timer !== null;
  stop();
  if ('step' in hit.dataset) go(Number(hit.dataset.step));
  else if ('move' in hit.dataset) go(at + Number(hit.dataset.move));
  else if (playing) draw();
  else play();
});
element.addEventListener('input', (event) => {
  if (!event.target.matches('.x-tree input')) return;
  stop();
  go(Number(event.target.value));
});
scope.addEventListener('candor:select', (event) => {
  const { pos } = event.detail;
  const found = passes.findIndex((pass) => pass.at <= pos && pos < pass.at + pass.n);
  if (found < 0 || found === at) return;
  stop();
  go(found);
});

if (typeof watch === 'function') watch('value', show);
show();
