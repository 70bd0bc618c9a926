// A customer written with nostr-tools: tags by hand, finalizeEvent, nip44, SimplePool. Exits 0 once a result
// was read. Which job it orders and how it prints are talk.mjs's.

import WebSocket from 'ws';
import { finalizeEvent, generateSecretKey, verifyEvent } from 'nostr-tools/pure';
import * as nip44 from 'nostr-tools/nip44';
import { SimplePool, useWebSocketImplementation } from 'nostr-tools/pool';
import { fail, giveUpAfter, leave, order, say } from './talk.mjs';

useWebSocketImplementation(WebSocket);
const job = order();
const secret = generateSecretKey();
const shared = nip44.getConversationKey(secret, job.provider);
giveUpAfter(job.timeoutMs);

const what = [
  ['i', job.repo, 'url', '', 'repo'],
  ...job.params.map(([key, value]) => ['param', key, value]),
];
const where = [
  ['p', job.provider],
  ['relays', ...job.relays],
];
const hidden = job.encrypt === 'nip44';
const request = finalizeEvent(
  {
    kind: job.kind,
    created_at: Math.floor(Date.now() / 1000),
    tags: hidden ? [...where, ['encrypted']] : [...what, ...where],
    content: hidden ? nip44.encrypt(JSON.stringify(what), shared) : '',
  },
  secret,
);

const pool = new SimplePool();
pool.subscribeMany(
  job.relays,
  { kinds: [7000, job.kind + 1000], authors: [job.provider], '#e': [request.id] },
  {
    onevent(event) {
      try {
        if (!verifyEvent(event)) fail(`${event.id} does not verify`);
        const encrypted = event.tags.some((t) => t[0] === 'encrypted');
        const content = encrypted ? nip44.decrypt(event.content, shared) : event.content;
        if (event.kind === 7000) {
          // Encrypted feedback is a list of tags, as an encrypted request is.
          const tags = encrypted ? [...event.tags, ...JSON.parse(content)] : event.tags;
          const [, status, info] = tags.find((t) => t[0] === 'status') ?? [];
          say({ type: 'feedback', id: event.id, status, info: info ?? null, encrypted, content });
          return;
        }
        say({
          type: 'result',
          id: event.id,
          kind: event.kind,
          request_id: event.tags.find((t) => t[0] === 'e')?.[1],
          encrypted,
          content,
          wire_tags: event.tags,
        });
        leave();
      } catch (error) {
        fail(`kind ${event.kind} could not be read: ${error.stack ?? error}`);
      }
    },
  },
);

say({ type: 'request', id: request.id, kind: request.kind });
try {
  await Promise.all(pool.publish(job.relays, request));
} catch (error) {
  fail(`a relay did not take the request: ${error}`);
}
