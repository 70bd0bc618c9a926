// What the two clients share: their command line and the one line of JSON they print per answer. It speaks
// no Nostr: each client does that with its own library, as that library's users would.

import { parseArgs } from 'node:util';

export function order() {
  const { values } = parseArgs({
    options: {
      relay: { type: 'string', multiple: true },
      provider: { type: 'string' },          // the provider's public key, hex
      kind: { type: 'string', default: '5000' },
      repo: { type: 'string' },
      cmd: { type: 'string', multiple: true },
      param: { type: 'string', multiple: true }, // key=value
      encrypt: { type: 'string', default: 'none' }, // none | nip44
      'timeout-s': { type: 'string', default: '60' },
    },
  });
  for (const name of ['relay', 'provider', 'repo', 'cmd'])
    if (!values[name]) fail(`--${name} is missing`);
  if (!['none', 'nip44'].includes(values.encrypt)) fail(`--encrypt ${values.encrypt} is not known`);
  const extra = (values.param ?? []).map((p) => {
    const at = p.indexOf('=');
    return [p.slice(0, at), p.slice(at + 1)];
  });
  return {
    ...values,
    relays: values.relay,
    kind: Number(values.kind),
    params: [...values.cmd.map((c, i) => [`cmd_${i}`, c]), ...extra],
    timeoutMs: Number(values['timeout-s']) * 1000,
  };
}

export function say(line) {
  process.stdout.write(JSON.stringify(line) + '\n');
}

// Ends the client well: the result is here. A feedback sent just before it may still be on its way.
export function leave() {
  setTimeout(() => process.stdout.write('', () => process.exit(0)), 500);
}

export function fail(why) {
  process.stderr.write(why + '\n');
  process.exit(2);
}

export function giveUpAfter(ms) {
  setTimeout(() => fail(`no result within ${ms} ms`), ms).unref();
}
