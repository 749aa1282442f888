// Looks at what usually goes wrong around the nodes.

import { get } from '../api.js';
import { badge, h, notice, table } from '../dom.js';
import { plural, when } from '../format.js';

export function open({ redraw, reload }) {
  let checks;
  let at;
  let asking = true;
  const again = () => { asking = true; redraw(); reload(); };
  return {
    title: 'Doctor',
    async load(signal) {
      const answer = await get(['doctor'], {}, signal);
      checks = [...(answer.items ?? answer.checks ?? answer)].sort((a, b) => a.ok - b.ok);
      at = answer.as_of_ms ?? Date.now();
      asking = false;
    },
    show() {
      const bad = checks.filter((check) => !check.ok).length;
      return [
        notice(bad ? 'bad' : 'good', bad ? `${plural(bad, 'check')} of ${checks.length} found something.` : `All ${checks.length} checks are well.`, ' Looked at ', when(at), '.'),
        h('p', { key: 'again', class: 'buttons' }, h('button', { type: 'button', disabled: asking, onclick: again }, asking ? 'Looking …' : 'Look again')),
        table('Checks', ['Check', 'Result', 'What it found', 'What to do'], checks.map((check) => ({ key: `${check.check} ${check.node_id ?? ''}`, cells: [
          check.node_id ? `${check.check} (${check.node_id})` : check.check, badge(check.ok ? 'well' : 'look', check.ok ? 'good' : 'bad'), check.says, check.ok ? '' : check.hint || '–'] }))),
      ];
    },
  };
}
