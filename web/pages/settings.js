// What belongs to this tab.

import { onSignedOut, token } from '../api.js';
import { remakeCharts } from '../chart.js';
import { facts, h, section } from '../dom.js';
import { live, role } from '../live.js';

const THEMES = [['', 'As the system'], ['light', 'Light'], ['dark', 'Dark']];
const KEY = 'im-presence.theme';

export function open({ redraw }) {
  const choose = (theme) => () => {
    if (theme) localStorage.setItem(KEY, theme);
    else localStorage.removeItem(KEY);
    document.documentElement.dataset.theme = theme;
    remakeCharts();
    redraw();
  };
  return {
    title: 'Settings',
    show() {
      const { summary = {} } = live;
      const now = localStorage.getItem(KEY) ?? '';
      return [
        section('Appearance', h('fieldset', null, h('legend', null, 'Colours'), THEMES.map(([theme, text]) => h('label', { class: 'choice' },
          h('input', { type: 'radio', name: 'theme', value: theme, checked: theme === now, onchange: choose(theme) }), ' ', text)))),
        section('Who asks', facts([['Name', summary.caller?.name ?? 'nobody has to sign in here'], ['Role', role()]]),
          token.get() && h('p', { class: 'buttons' }, h('button', { type: 'button', onclick: () => { token.forget(); onSignedOut.call(false); } }, 'Sign out'))),
        section('This system', facts([['System', summary.system ?? '–'], ['Store', summary.store_id ?? '–'], ['Generation', summary.generation ?? '–'], ['Version', summary.version ?? '–']]),
          h('p', null, h('a', { href: 'api/v1/openapi.json' }, 'The REST API as OpenAPI 3.1'))),
      ];
    },
  };
}
