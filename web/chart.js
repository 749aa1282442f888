// Charts of what came while this tab was open. uPlot is loaded with the first one.

import { clock } from './format.js';
import { h } from './dom.js';

const HEIGHT = 160;
/** What the first minute is drawn in. */
const SHORTEST_S = 60;
let library;

/** `series`: [{ label, of: (sample) => number }]. `samples` have `at`, in seconds. */
export function chart(title, series, samples, unit = '') {
  const last = samples().at(-1);
  const now = series.map(({ label, of }) => `${label} ${last ? show(of(last)) : 'not known'}${unit}`).join(', ');
  return h('figure', { key: title },
    h('figcaption', null, title),
    h('div', { key: 'plot', class: 'plot', role: 'img', 'aria-label': `${title}: now ${now}`, keep: (element) => plot(element, series, samples, unit) }));
}

const show = (value) => (value === null || value === undefined ? '–' : Number(value.toPrecision(4)).toLocaleString('en'));

/** A canvas does not know the colours of the page by name. */
function color(element, name) {
  element.style.setProperty('color', `var(${name})`);
  const { color: known } = getComputedStyle(element);
  element.style.removeProperty('color');
  return known;
}

async function plot(element, series, samples, unit) {
  library ??= import('./vendor/uplot.js');
  const { default: UPlot } = await library;
  let drawn;
  const data = () => [samples().map((sample) => sample.at), ...series.map(({ of }) => samples().map((sample) => of(sample) ?? null))];
  // From the samples themselves: of a single one uPlot would make a day.
  const window = () => {
    const last = samples().at(-1)?.at ?? 0;
    return [Math.min(samples()[0]?.at ?? 0, last - SHORTEST_S), last];
  };
  const make = () => {
    drawn?.destroy();
    const axis = { stroke: color(element, '--soft'), grid: { stroke: color(element, '--line'), width: 1 }, ticks: { stroke: color(element, '--line'), width: 1 } };
    drawn = new UPlot({
      width: Math.max(200, element.clientWidth),
      height: HEIGHT,
      cursor: { points: { size: 6 }, drag: { x: false, y: false } },
      tzDate: (at) => UPlot.tzDate(new Date(at * 1000), 'Etc/UTC'),
      scales: { x: { range: window }, y: { range: (_, low, high) => [Math.min(0, low ?? 0), high > 0 ? high * 1.1 : 1] } },
      axes: [{ ...axis, space: 80, values: (_, ticks) => ticks.map((at) => clock(at * 1000).slice(0, 8)) }, { ...axis, size: 64, values: (_, ticks) => ticks.map(show) }],
      series: [
        { label: 'at', value: ({ data: [all] }, at) => ((at ?? all.at(-1)) ? clock((at ?? all.at(-1)) * 1000) : '–') },
        ...series.map(({ label }, i) => ({
          label, stroke: color(element, `--series-${i + 1}`), width: 2, points: { show: false },
          // Of the last moment, unless one is pointed at.
          value: ({ data, cursor }, value) => { const shown = (cursor.idx ?? null) === null ? data[i + 1].at(-1) : value; return shown === null || shown === undefined ? '–' : show(shown) + unit; },
        })),
      ],
    }, data(), element);
  };
  make();
  const scheme = matchMedia('(prefers-color-scheme: dark)');
  const size = new ResizeObserver(() => drawn.setSize({ width: Math.max(200, element.clientWidth), height: HEIGHT }));
  size.observe(element);
  scheme.addEventListener('change', make);
  element.redraw = () => drawn.setData(data());
  element.remake = make;
  element.end = () => {
    size.disconnect();
    scheme.removeEventListener('change', make);
    drawn.destroy();
  };
}

const plots = (call) => document.querySelectorAll('.plot').forEach((element) => element[call]?.());
export const redrawCharts = () => plots('redraw');
export const remakeCharts = () => plots('remake');
export const endCharts = () => plots('end');
