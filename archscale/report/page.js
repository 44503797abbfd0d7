// Draws the curves, switches their axes, and says what was measured under the pointer.
(() => {
  'use strict';
  const H = 10000;  // of a plot, in units of its drawing, and its width
  const data = JSON.parse(document.getElementById('data').textContent), runs = data.runs;
  const NAMES = {step: 'steps', tokens: 'tokens', flops: 'training FLOPs'};
  const SI = [[1e12, 'T'], [1e9, 'B'], [1e6, 'M'], [1e3, 'k']];
  const FEW = 12;  // readings up to which each is marked
  const MOST_EVENTS = 60;  // lines on one chart; more are thinned
  const tip = document.getElementById('tip'), controls = document.getElementById('controls');
  const wanted = {x: 'step', y: 'auto'}, views = new Map();

  // Numbers, as archscale/report/scale.py writes them.
  const trim = text => text.includes('.') ? text.replace(/0+$/, '').replace(/\.$/, '') : text;
  const decimals = (value, step) => {
    const places = step ? Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) : Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value))));
    return trim(value.toFixed(Math.min(places, 6)));
  };
  const label = (value, step = 0) => {
    const size = Math.abs(value);
    if (value === 0) return '0';
    if (size >= 1e15 || size < 1e-3) { const [m, e] = value.toExponential(2).split('e'); return +m + 'e' + +e; }
    for (const [unit, letter] of SI) if (size >= unit) return decimals(value / unit, step / unit) + letter;
    return decimals(value, step);
  };
  const shown = value => {
    const size = Math.abs(value);
    if (size >= 1e4 && size < 1e15) return Math.round(value).toLocaleString('en');
    return size !== 0 && (size < 1e-3 || size >= 1e15) ? value.toExponential(3).replace('e+', 'e') : String(+value.toPrecision(4));
  };
  const ticks = (lo, hi, log, count) => {
    const out = [];
    if (!(hi > lo)) return [[lo, label(lo)]];
    if (log && hi / lo >= 8) {
      const decades = Math.log10(hi / lo), every = Math.max(1, Math.ceil(decades / count));
      const digits = decades > count / 1.5 ? [1] : decades > 1.5 ? [1, 3] : [1, 2, 5];
      for (let e = Math.floor(Math.log10(lo)); e <= Math.ceil(Math.log10(hi)); e++)
        if (e % every === 0) for (const d of digits) { const v = d * 10 ** e; if (v >= lo && v <= hi) out.push([v, label(v)]); }
      return out;
    }
    const raw = (hi - lo) / count, unit = 10 ** Math.floor(Math.log10(raw));
    const step = unit * [1, 2, 5, 10].find(f => f * unit >= raw * 0.75);
    for (let k = Math.ceil(lo / step - 1e-9); k <= Math.floor(hi / step + 1e-9); k++) out.push([k * step, label(k * step, step)]);
    return out;
  };
  const share = (v, {lo, hi, log}) => log ? Math.log(v / lo) / Math.log(hi / lo) : (v - lo) / (hi - lo);
  const value = (f, {lo, hi, log}) => log ? lo * (hi / lo) ** f : lo + f * (hi - lo);

  // Steps onto the other axes and back, by the corners of steps → tokens.
  const between = (v, points, a, b) => {
    let i = 1;
    while (i < points.length - 1 && points[i][a] < v) i++;
    const p = points[i - 1], q = points[i] || p;
    return q[a] === p[a] ? p[b] : p[b] + (v - p[a]) * (q[b] - p[b]) / (q[a] - p[a]);
  };
  const place = (run, step, kind) => kind === 'step' ? step : between(step, runs[run].tokens, 0, 1) * (kind === 'flops' ? runs[run].flops : 1);
  const stepAt = (run, x, kind) => kind === 'step' ? x : between(kind === 'flops' ? x / runs[run].flops : x, runs[run].tokens, 1, 0);
  const xScale = (kind, log) => {
    const ends = [];
    runs.forEach(({tokens, flops}, run) => {
      if (tokens.length && (kind !== 'flops' || flops)) ends.push(place(run, tokens[0][0], kind), place(run, tokens[tokens.length - 1][0], kind));
    });
    const lo = Math.min(...ends), hi = Math.max(...ends);
    return {lo, hi: hi > lo ? hi : lo + 1, log: log && lo > 0};
  };
  const yScale = chart => {
    let lo = Infinity, hi = -Infinity;
    for (const {y} of chart.curves) for (const v of y) if (v !== null) { lo = Math.min(lo, v); hi = Math.max(hi, v); }
    if (!(hi >= lo)) [lo, hi] = [0, 1];
    const log = lo > 0 && (wanted.y === 'auto' ? chart.log ?? hi > 30 * lo : wanted.y === 'log');
    if (chart.top !== null && !log) hi = Math.min(hi, chart.top);
    const flat = hi - lo <= 1e-6 * Math.max(Math.abs(lo), Math.abs(hi));
    if (log) { const margin = flat ? 1.1 : (hi / lo) ** 0.04; return {lo: lo / margin, hi: hi * margin, log}; }
    const margin = flat ? Math.abs(hi) * 0.1 || 1 : (hi - lo) * 0.04;
    return {lo: lo - margin, hi: hi + margin, log};
  };

  const xLabels = (plot, kind, made, at) => {
    plot.querySelector('.xs').innerHTML = made.map(([v, text]) => {
      const left = 100 * at(v);
      return `<span class="${left < 4 ? 'l' : left > 96 ? 'r' : ''}" style="left:${left}%">${text}</span>`;
    }).join('') + `<i>${NAMES[kind]}</i>`;
  };
  const eventMarks = (run, px, height) => {
    const all = [...new Set(runs[run].eventSteps.map(px))], every = Math.ceil(all.length / MOST_EVENTS);
    return all.length ? `<path class="event" d="${all.filter((_, i) => i % every === 0).map(x => `M${x} 0V${height}`).join('')}"/>` : '';
  };
  const drawCurves = plot => {
    const chart = data.charts[plot.dataset.chart], svg = plot.querySelector('svg'), wide = plot.closest('.wide');
    const kind = chart.axis || wanted.x, x = xScale(kind, chart.axis), y = yScale(chart);
    const px = (run, step) => Math.round(H * share(place(run, step, kind), x)), py = v => Math.round(H * (1 - share(v, y)));
    const line = (run, xs, ys) => xs.map((s, i) => ys[i] === null ? '' :
      i && ys[i - 1] !== null ? `L${px(run, s)} ${py(ys[i])}` : `M${px(run, s)} ${py(ys[i])}h0`).join('');
    const dots = c => c.x.map((s, i) => c.y[i] === null ? '' : `M${px(c.run, s)} ${py(c.y[i])}h0`).join('');
    const marks = ticks(y.lo, y.hi, y.log, wide ? 5 : 4);
    svg.innerHTML = `<path class="grid" d="${marks.map(([v]) => `M0 ${py(v)}h${H}`).join('')}"/>`
      + runs.map((_, run) => eventMarks(run, s => px(run, s), H)).join('')
      + chart.curves.map(c => (c.dots ? '' : `<path class="${c.mean ? 'raw ' : ''}${c.look}" d="${line(c.run, c.x, c.y)}"/>`)
        + (c.dots || c.x.length <= FEW ? `<path class="dot ${c.look}" d="${dots(c)}"/>` : '')
        + (c.mean ? `<path class="${c.look}" d="${line(c.run, c.mean.x, c.mean.y)}"/>` : '')).join('');
    svg.setAttribute('aria-label', `${plot.closest('figure').querySelector('b').textContent} by ${NAMES[kind]}`);
    plot.querySelector('.ys').innerHTML = marks.map(([v, text]) => `<span style="top:${100 - 100 * share(v, y)}%">${text}</span>`).join('');
    xLabels(plot, kind, ticks(x.lo, x.hi, x.log, wide ? 7 : 4), v => share(v, x));
    plot.closest('figure').classList.toggle('log', y.log);
    views.set(plot, {kind, x});
  };
  const drawMap = plot => {
    const run = +plot.dataset.run, x = xScale('step'), svg = plot.querySelector('svg');
    const [lo, hi] = [x.lo, x.hi].map(step => place(run, step, wanted.x));
    for (const old of svg.querySelectorAll('.event')) old.remove();
    svg.insertAdjacentHTML('beforeend', eventMarks(run, s => s, svg.viewBox.baseVal.height));
    xLabels(plot, wanted.x, ticks(lo, hi, false, 4), v => share(stepAt(run, v, wanted.x), x));
    views.set(plot, {x});
  };
  const plots = [...document.querySelectorAll('.plot')];
  const draw = () => plots.forEach(plot => 'chart' in plot.dataset ? drawCurves(plot) : drawMap(plot));
  draw();

  // The read-out.
  const cursor = document.createElement('div');
  cursor.className = 'cursor';
  const line = (text, kind = '') => { const p = document.createElement('p'); p.textContent = text; p.className = kind; return p; };
  const where = (run, step) => {
    const tokens = place(run, step, 'tokens'), flops = runs[run].flops;
    return `step ${Math.round(step).toLocaleString('en')} · ${label(tokens)} tokens` + (flops ? ` · ${label(tokens * flops)} FLOPs` : '');
  };
  const readCurves = (plot, f) => {
    const {curves} = data.charts[plot.dataset.chart], {kind, x} = views.get(plot), out = [];
    const nearest = (run, {x: xs, y: ys}) => xs.reduce(([best, gap], step, i) => {
      const away = ys[i] === null ? Infinity : Math.abs(share(place(run, step, kind), x) - f);
      return away < gap ? [i, away] : [best, gap];
    }, [-1, Infinity]);
    let base = null;
    for (const c of curves) {
      const [i, gap] = nearest(c.run, c);
      if (i < 0 || (c.dots && gap > 0.03)) continue;
      base ??= [c.run, c.x[i]];
      const mean = c.mean ? ` (mean around it ${shown(c.mean.y[nearest(c.run, c.mean)[0]])})` : '';
      out.push(line(`${curves.length > 1 ? c.name + ' ' : ''}${shown(c.y[i])}${mean}`));
    }
    if (!base) return [];
    const at = value(f, x), reach = Math.abs(stepAt(base[0], value(Math.min(1, f + 0.01), x), kind) - stepAt(base[0], at, kind)) + 0.5;
    const several = new Set(curves.map(c => c.run)).size > 1;  // one step is not the same number of tokens in all
    const events = runs[base[0]].events.filter(([step]) => Math.abs(step - base[1]) <= reach).slice(0, 3);
    return [line(several ? `${kind === 'step' ? 'step' : NAMES[kind]} ${label(at)}` : where(...base)), ...out,
      ...events.map(([step, text]) => line(`event at step ${step}: ${text}`, 'event'))];
  };
  const images = new Map(), colors = new Map();
  for (let i = 0; i < data.palette.length / 6; i++) colors.set(data.palette.substr(6 * i, 6), i);
  const pixels = image => {
    const href = image.getAttribute('href');
    if (!images.has(image)) images.set(image, (async () => {
      const source = new Image(), g = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
      source.src = href;
      await source.decode();
      [g.canvas.width, g.canvas.height] = [source.width, source.height];
      g.drawImage(source, 0, 0);
      return g;
    })());
    return images.get(image);
  };
  const readMap = async (plot, f, g) => {
    const {lo, hi, log, run, names} = plot.dataset, {x} = views.get(plot), image = plot.querySelector('image');
    const canvas = await pixels(image), {width: w, height: h} = canvas.canvas;
    const [start, span] = ['x', 'width'].map(name => +image.getAttribute(name)), inside = (value(f, x) - start) / span;
    if (inside < 0 || inside > 1) return [];
    const column = Math.min(w - 1, Math.floor(inside * w)), row = Math.min(h - 1, Math.floor(g * h));
    const rgba = canvas.getImageData(column, row, 1, 1).data, hex = [...rgba.slice(0, 3)].map(v => v.toString(16).padStart(2, '0')).join('');
    const level = rgba[3] ? colors.get(hex) : undefined, name = plot.closest('figure').dataset.rows.split(' ')[row];
    const v = level === undefined ? 'no value'
      : '≈ ' + shown(+value((level + 0.5) / colors.size, {lo: +lo, hi: +hi, log: log === 'true'}).toPrecision(3));
    return [line(`${/^\d+(-\d+)?$/.test(name) ? 'entry ' : ''}${name}: ${v}`), line('from ' + where(+run, Math.ceil(start + column / w * (span + 1))))];
  };
  let latest = 0;
  const show = async event => {
    const svg = event.target.closest?.('.plot svg'), mine = ++latest;
    if (!svg) { tip.hidden = true; cursor.remove(); return; }
    const plot = svg.parentNode, box = svg.getBoundingClientRect();
    const [f, g] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height].map(v => Math.min(1, Math.max(0, v)));
    const lines = 'chart' in plot.dataset ? readCurves(plot, f) : await readMap(plot, f, g);
    if (mine !== latest) return;
    tip.replaceChildren(...lines);
    tip.hidden = !lines.length;
    cursor.style.left = `${event.clientX - plot.getBoundingClientRect().left}px`;
    cursor.style.height = `${box.height}px`;
    plot.append(cursor);
    const right = event.clientX + 14 + tip.offsetWidth < innerWidth ? event.clientX + 14 : Math.max(4, event.clientX - 14 - tip.offsetWidth);
    tip.style.left = `${right}px`;
    tip.style.top = `${Math.max(4, Math.min(innerHeight - tip.offsetHeight - 4, event.clientY + 14))}px`;
  };
  addEventListener('pointermove', show, {passive: true});
  addEventListener('pointerdown', show, {passive: true});
  addEventListener('beforeprint', () => { tip.hidden = true; cursor.remove(); });
  if (controls) {
    controls.hidden = false;
    controls.addEventListener('change', () => {
      for (const name of ['x', 'y']) wanted[name] = controls.elements[name].value;
      draw();
    });
  }
})();
