// Read-out under the pointer, and switches of the axes. Without this script the page is complete.
(() => {
  'use strict';
  const H = 10000, data = JSON.parse(document.getElementById('data').textContent), runs = data.runs;
  const NAMES = {step: 'steps', tokens: 'tokens', flops: 'training FLOPs'};
  const SI = [[1e12, 'T'], [1e9, 'B'], [1e6, 'M'], [1e3, 'k']];
  const tip = document.getElementById('tip'), controls = document.getElementById('controls');
  const cache = new Map(), wanted = {x: 'step', y: 'auto'};

  // Numbers: the same rules as archscale/report/scale.py.
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
    if (log && hi / lo >= 8) {
      const decades = Math.log10(hi / lo), every = Math.max(1, Math.ceil(decades / count));
      const digits = decades > count / 1.5 ? [1] : decades > 1.5 ? [1, 3] : [1, 2, 5], out = [];
      for (let e = Math.floor(Math.log10(lo)); e <= Math.ceil(Math.log10(hi)); e++)
        if (e % every === 0) for (const d of digits) { const v = d * 10 ** e; if (v >= lo && v <= hi) out.push([v, label(v)]); }
      return out;
    }
    const raw = (hi - lo) / count, unit = 10 ** Math.floor(Math.log10(raw));
    const step = unit * [1, 2, 5, 10].find(f => f * unit >= raw * 0.75), out = [];
    for (let k = Math.ceil(lo / step - 1e-9); k <= Math.floor(hi / step + 1e-9); k++) out.push([k * step, label(k * step, step)]);
    return out;
  };
  const share = (v, lo, hi, log) => log ? Math.log(v / lo) / Math.log(hi / lo) : (v - lo) / (hi - lo);
  const value = (f, lo, hi, log) => log ? lo * (hi / lo) ** f : lo + f * (hi - lo);

  // Steps onto the other axes and back, by the corners of steps → tokens.
  const between = (v, points, a, b) => {
    let i = 1;
    while (i < points.length - 1 && points[i][a] < v) i++;
    const p = points[i - 1], q = points[i] || p;
    return q[a] === p[a] ? p[b] : p[b] + (v - p[a]) * (q[b] - p[b]) / (q[a] - p[a]);
  };
  const place = (run, step, kind) => kind === 'step' ? step : between(step, runs[run].tokens, 0, 1) * (kind === 'flops' ? runs[run].flops : 1);
  const stepAt = (run, x, kind) => kind === 'step' ? x : between(kind === 'flops' ? x / runs[run].flops : x, runs[run].tokens, 1, 0);

  // A chart's curves as numbers, taken from its paths.
  const read = svg => {
    if (cache.has(svg)) return cache.get(svg);
    const set = svg.dataset, [x0, , width] = svg.getAttribute('viewBox').split(' ').map(Number);
    const chart = {own: set.x, lo: +set.lo, hi: +set.hi, log: 'log' in set, now: null, curves: [], ticks: null};
    const atX = u => set.x === 'step' ? u : value(u / H, +set.xlo, +set.xhi, 'xlog' in set);
    if (svg.classList.contains('line')) for (const path of svg.querySelectorAll('path[data-run]:not(.event)')) {
      let x = 0, y = 0;
      const points = [];
      for (const part of path.getAttribute('d').match(/M[^M]+/g) || []) {
        const n = part.match(/-?\d+/g).map(Number);
        for (let i = 0; i + 1 < n.length; i += 2) {
          x = i ? x + n[i] : n[i]; y = i ? y + n[i + 1] : n[i + 1];
          if (i !== 2) points.push({x: atX(x), y: value(1 - y / H, chart.lo, chart.hi, chart.log), start: i === 0});
        }
      }
      chart.curves.push({path, points, run: +path.dataset.run, name: path.dataset.name, dot: path.classList.contains('dot'), mean: path.classList.contains('mean')});
    }
    chart.now = {x: set.x, lo: chart.lo, hi: chart.hi, log: chart.log, xlo: set.x === 'step' ? x0 : +set.xlo,
      xhi: set.x === 'step' ? x0 + width : +set.xhi, xlog: 'xlog' in set, x0, width};
    chart.first = {...chart.now, d: [...svg.querySelectorAll('path')].map(path => path.getAttribute('d')), box: svg.getAttribute('viewBox')};
    cache.set(svg, chart);
    return chart;
  };

  const labels = (svg, now, chart) => {
    const wide = svg.closest('figure').classList.contains('wide');
    const ys = svg.parentNode.querySelector('.ys'), xs = svg.parentNode.querySelector('.xs');
    if (svg.classList.contains('line'))
      ys.innerHTML = ticks(now.lo, now.hi, now.log, wide ? 5 : 4).map(([v, t]) =>
        `<span style="top:${100 - 100 * share(v, now.lo, now.hi, now.log)}%">${t}</span>`).join('');
    xs.innerHTML = ticks(now.xlo, now.xhi, now.xlog, wide ? 7 : 4).map(([v, t]) => {
      const at = 100 * (now.toShare ? now.toShare(v) : share(v, now.xlo, now.xhi, now.xlog));
      return `<span class="${at < 4 ? 'l' : at > 96 ? 'r' : ''}" style="left:${at}%">${t}</span>`;
    }).join('') + `<i>${NAMES[now.x]}</i>`;
  };

  const redraw = svg => {
    const chart = read(svg), first = chart.first, paths = [...svg.querySelectorAll('path')];
    const x = chart.own === 'step' ? wanted.x : chart.own;
    if (svg.classList.contains('heat')) {
      const run = +svg.dataset.run, lo = place(run, first.xlo, x), hi = place(run, first.xhi, x);
      chart.now = {...first, x, xlo: lo, xhi: hi, toShare: v => share(stepAt(run, v, x), first.xlo, first.xhi)};
      labels(svg, chart.now, chart);
      return;
    }
    const all = chart.curves.flatMap(c => c.points.map(p => p.y)), least = Math.min(...all), most = Math.max(...all);
    const log = wanted.y === 'auto' ? chart.log : wanted.y === 'log' && least > 0;
    if (x === chart.own && log === chart.log) {
      paths.forEach((path, i) => path.setAttribute('d', first.d[i]));
      svg.setAttribute('viewBox', first.box);
      chart.now = {...first};
      labels(svg, chart.now, chart);
      return;
    }
    const now = {x, log, lo: chart.lo, hi: chart.hi, x0: 0, width: H, xlog: first.xlog, xlo: first.xlo, xhi: first.xhi};
    if (log !== chart.log) {
      const pad = most - least > 1e-6 * Math.max(Math.abs(least), Math.abs(most)) ? 0.04 : 0;
      if (log) { const m = pad ? (most / least) ** pad : 1.1; now.lo = least / m; now.hi = most * m; }
      else { const m = pad ? (most - least) * pad : Math.abs(most) * 0.1 || 1; now.lo = least - m; now.hi = most + m; }
    }
    const onto = (run, v) => x === chart.own ? v : place(run, v, x);
    if (x !== chart.own) {
      const used = [...new Set(chart.curves.map(c => c.run))];
      now.xlo = Math.min(...used.map(run => place(run, first.xlo, x)));
      now.xhi = Math.max(...chart.curves.flatMap(c => c.points.length ? [place(c.run, c.points[c.points.length - 1].x, x)] : []));
      if (!(now.xhi > now.xlo)) now.xhi = now.xlo + 1;
    }
    const px = (run, v) => Math.round(H * share(onto(run, v), now.xlo, now.xhi, now.xlog));
    const py = v => Math.round(H * (1 - share(v, now.lo, now.hi, now.log)));
    svg.setAttribute('viewBox', `0 0 ${H} ${H}`);
    for (const c of chart.curves) c.path.setAttribute('d', c.points.map(p =>
      (c.dot ? `M${px(c.run, p.x)} ${py(p.y)}h0` : `${p.start ? 'M' : 'L'}${px(c.run, p.x)} ${py(p.y)}` + (p.start ? 'h0' : ''))).join(''));
    for (const path of svg.querySelectorAll('path.event')) {
      const run = +path.dataset.run, places = new Set(runs[run].eventSteps.map(s => px(run, chart.own === 'step' ? s : place(run, s, chart.own))));
      path.setAttribute('d', [...places].slice(0, 200).map(v => `M${v} 0V${H}`).join(''));
    }
    svg.querySelector('path.grid').setAttribute('d', ticks(now.lo, now.hi, now.log, svg.closest('.wide') ? 5 : 4).map(([v]) => `M0 ${py(v)}h${H}`).join(''));
    chart.now = now;
    labels(svg, now, chart);
  };

  // The read-out.
  const cursor = document.createElement('div');
  cursor.className = 'cursor';
  const line = (text, kind) => { const p = document.createElement('p'); p.textContent = text; if (kind) p.className = kind; return p; };
  const where = (run, step) => {
    const tokens = place(run, step, 'tokens'), flops = runs[run].flops;
    return `step ${Math.round(step).toLocaleString('en')} · ${label(tokens)} tokens` + (flops ? ` · ${label(tokens * flops)} FLOPs` : '');
  };
  const events = (run, step, reach) => runs[run].events.filter(([s]) => Math.abs(s - step) <= reach).slice(0, 3)
    .map(([s, text]) => line(`event at step ${s}: ${text}`, 'event'));
  const levels = svg => {
    const chart = read(svg);
    if (!chart.pixels) {
      chart.pixels = new Promise(done => {
        const image = new Image();
        image.onload = () => {
          const canvas = document.createElement('canvas'), g = canvas.getContext('2d');
          canvas.width = image.width; canvas.height = image.height;
          g.drawImage(image, 0, 0);
          done({w: image.width, h: image.height, rgba: g.getImageData(0, 0, image.width, image.height).data});
        };
        image.src = svg.querySelector('image').getAttribute('href');
      });
    }
    return chart.pixels;
  };
  const colors = new Map();
  for (let i = 0; i < data.palette.length / 6; i++) colors.set(parseInt(data.palette.substr(6 * i, 6), 16), i);

  const readLine = (svg, f) => {
    const chart = read(svg), now = chart.now, at = value(f, now.xlo, now.xhi, now.xlog), out = [];
    const nearest = c => c.points.reduce(([best, gap], p) => {
      const away = Math.abs(share(now.x === chart.own ? p.x : place(c.run, p.x, now.x), now.xlo, now.xhi, now.xlog) - f);
      return away < gap ? [p, away] : [best, gap];
    }, [null, Infinity]);
    let base = null;
    for (const [i, c] of chart.curves.entries()) {
      if (!c.name || !c.points.length) continue;
      const [best, gap] = nearest(c), next = chart.curves[i + 1];
      if (c.dot && gap > 0.03) continue;
      const step = chart.own === 'step' ? best.x : stepAt(c.run, best.x, chart.own);
      if (!base) base = [c.run, step];
      out.push(line((chart.curves.filter(o => o.name).length > 1 ? c.name + ' ' : '') + shown(best.y)
        + (next && next.mean ? ` (mean around it ${shown(nearest(next)[0].y)})` : '')));
    }
    if (!base) return [];
    const reach = Math.abs(stepAt(base[0], value(Math.min(1, f + .01), now.xlo, now.xhi, now.xlog), now.x) - stepAt(base[0], at, now.x)) + .5;
    const several = new Set(chart.curves.map(c => c.run)).size > 1;  // one step is not the same number of tokens in all
    return [line(several ? `${now.x === 'step' ? 'step' : NAMES[now.x]} ${label(at)}` : where(...base)), ...out, ...events(base[0], base[1], reach)];
  };
  const readHeat = async (svg, f, g) => {
    const {w, h, rgba} = await levels(svg), set = svg.dataset, first = read(svg).first;
    const image = svg.querySelector('image'), start = +image.getAttribute('x'), span = +image.getAttribute('width');
    const inside = (first.xlo + f * (first.xhi - first.xlo) - start) / span;
    if (inside < 0 || inside > 1) return [];
    const column = Math.min(w - 1, Math.floor(inside * w)), row = Math.min(h - 1, Math.floor(g * h)), i = 4 * (row * w + column);
    const name = svg.closest('figure').dataset.rows.split(' ')[row];
    const step = start + column / w * (span + 1);
    const level = rgba[i + 3] ? colors.get(rgba[i] << 16 | rgba[i + 1] << 8 | rgba[i + 2]) : undefined;
    const v = level === undefined ? 'no value' : '≈ ' + shown(+value(level / (data.palette.length / 6 - 1), +set.lo, +set.hi, 'log' in set).toPrecision(3));
    return [line(`${/^\d+$/.test(name) ? 'entry ' : ''}${name}: ${v}`), line('from ' + where(+set.run, Math.ceil(step)))];
  };
  let latest = 0;
  const show = async event => {
    const svg = event.target.closest && event.target.closest('.plot svg');
    const mine = ++latest;
    if (!svg) { tip.hidden = true; cursor.remove(); return; }
    const box = svg.getBoundingClientRect(), f = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const g = Math.min(1, Math.max(0, (event.clientY - box.top) / box.height));
    const lines = svg.classList.contains('heat') ? await readHeat(svg, f, g) : readLine(svg, f);
    if (mine !== latest) return;
    tip.replaceChildren(...lines);
    tip.hidden = !lines.length;
    const plot = svg.parentNode.getBoundingClientRect();
    cursor.style.left = `${event.clientX - plot.left}px`;
    cursor.style.height = `${box.height}px`;
    svg.parentNode.append(cursor);
    const right = event.clientX + 14 + tip.offsetWidth < innerWidth ? event.clientX + 14 : Math.max(4, event.clientX - 14 - tip.offsetWidth);
    tip.style.left = `${right}px`;
    tip.style.top = `${Math.max(4, Math.min(innerHeight - tip.offsetHeight - 4, event.clientY + 14))}px`;
  };
  addEventListener('pointermove', show, {passive: true});
  addEventListener('pointerdown', show, {passive: true});

  if (controls) {
    controls.hidden = false;
    controls.addEventListener('change', () => {
      for (const name of ['x', 'y']) wanted[name] = controls.elements[name].value;
      for (const svg of document.querySelectorAll('.plot svg')) redraw(svg);
    });
    addEventListener('beforeprint', () => { tip.hidden = true; cursor.remove(); });
  }
})();
