// A customer written with NDK: NDKDVMRequest, its own encryption, its own reading of feedback and result.
// Exits 0 once a result was read. Which job it orders and how it prints are talk.mjs's.

import WebSocket from 'ws';
globalThis.WebSocket ??= WebSocket;
import NDK, {
  NDKDVMJobFeedback,
  NDKDVMJobResult,
  NDKDVMRequest,
  NDKPrivateKeySigner,
  NDKRelaySet,
} from '@nostr-dev-kit/ndk';
import { fail, giveUpAfter, leave, order, say } from './talk.mjs';

const job = order();
const signer = NDKPrivateKeySigner.generate();
const ndk = new NDK({ explicitRelayUrls: job.relays, signer, enableOutboxModel: false });
giveUpAfter(job.timeoutMs);
await ndk.connect(5000);
const relays = NDKRelaySet.fromRelayUrls(job.relays, ndk);
const provider = ndk.getUser({ pubkey: job.provider });

const request = new NDKDVMRequest(ndk);
request.kind = job.kind;
request.addInput(job.repo, 'url', '', 'repo');
for (const [key, value] of job.params) request.addParam(key, value);
request.tags.push(['relays', ...job.relays]);
if (job.encrypt === 'nip44') await request.encryption(provider, signer);
else request.dvm = provider;
await request.sign();

const answers = ndk.subscribe(
  { kinds: [7000, job.kind + 1000], authors: [job.provider], '#e': [request.id] },
  { closeOnEose: false, groupable: false, relaySet: relays },
);
answers.on('event', async (event) => {
  try {
    if (event.kind === 7000) {
      const feedback = await NDKDVMJobFeedback.from(event);
      say({
        type: 'feedback',
        id: feedback.id,
        status: feedback.status,
        info: feedback.getMatchingTags('status')[0]?.[2] ?? null,
        encrypted: feedback.encrypted,
        content: feedback.content,
      });
      return;
    }
    const result = NDKDVMJobResult.from(event);
    const encrypted = result.getMatchingTags('encrypted').length > 0;
    if (encrypted) await result.decrypt();
    if (result.jobRequestId !== request.id) fail(`the result names ${result.jobRequestId}`);
    say({
      type: 'result',
      id: result.id,
      kind: result.kind,
      request_id: result.jobRequestId,
      encrypted,
      content: result.result ?? '',
      wire_tags: event.rawEvent().tags,
    });
    leave();
  } catch (error) {
    fail(`kind ${event.kind} could not be read: ${error.stack ?? error}`);
  }
});

say({ type: 'request', id: request.id, kind: request.kind });
await request.publish(relays, 10000, job.relays.length);
