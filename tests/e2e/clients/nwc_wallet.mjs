// A wallet service written with Alby's SDK: NIP-47 on one side, a wallet of an LNbits server on the other. It prints
// `ready` once its info event is on the relay, then serves until it is ended. Run by tests/support/nwc.rs.

import { parseArgs } from 'node:util';
import WebSocket from 'ws';
import { NWCWalletService, NWCWalletServiceKeyPair } from '@getalby/sdk/nwc';

globalThis.WebSocket ??= WebSocket;
// The SDK talks on stdout, which is ours to be read.
console.log = console.info = console.debug = console.warn = () => {};
const names = ['relay', 'lnbits', 'key', 'secret', 'client'];
const { values: given } = parseArgs({ options: Object.fromEntries(names.map((n) => [n, { type: 'string' }])) });
const keys = new NWCWalletServiceKeyPair(given.secret, given.client);
const service = new NWCWalletService({ relayUrl: given.relay });

// === the wallet behind it ===

async function ask(path, body) {
  const answer = await fetch(given.lnbits + path, {
    method: body ? 'POST' : 'GET',
    headers: { 'X-Api-Key': given.key, 'Content-Type': 'application/json' },
    body: body && JSON.stringify(body),
  });
  const said = await answer.json();
  if (!answer.ok) throw Object.assign(new Error(said.detail ?? 'it failed'), { final: said.status === 'failed' });
  return said;
}

const unix = (text) => Math.floor(Date.parse(/Z|\+/.test(text) ? text : `${text}Z`) / 1000);
const transaction = (row) => ({
  type: row.amount < 0 ? 'outgoing' : 'incoming',
  state: { success: 'settled', pending: 'pending', failed: 'failed' }[row.status],
  invoice: row.bolt11,
  description: row.memo ?? '',
  payment_hash: row.payment_hash,
  preimage: row.status === 'success' ? row.preimage : undefined,
  amount: Math.abs(row.amount),
  fees_paid: Math.abs(row.fee),
  created_at: unix(row.created_at),
  expires_at: row.expiry ? unix(row.expiry) : undefined,
  settled_at: row.status === 'success' ? unix(row.updated_at) : undefined,
});
const refuse = (code, message) => ({ error: { code, message }, result: undefined });
const open = new Set();

// === what it answers ===

const handler = {
  async getInfo() {
    return { result: { alias: 'test', methods, notifications: ['payment_received'] }, error: undefined };
  },
  async getBalance() {
    return { result: { balance: (await ask('/api/v1/wallet')).balance }, error: undefined };
  },
  async makeInvoice({ amount, description, description_hash, expiry }) {
    if (amount % 1000) return refuse('OTHER', 'only whole sats');
    const memo = description ?? '';
    const made = await ask('/api/v1/payments', { out: false, unit: 'sat', amount: amount / 1000, memo, description_hash, expiry });
    open.add(made.payment_hash);
    return { result: transaction(made), error: undefined };
  },
  async lookupInvoice({ payment_hash }) {
    const { data } = await ask(`/api/v1/payments/paginated?recheck_pending=true&payment_hash=${payment_hash}`);
    if (!data.length) return refuse('NOT_FOUND', 'no such invoice');
    return { result: transaction(data.find((row) => row.amount < 0) ?? data[0]), error: undefined };
  },
  async payInvoice({ invoice }) {
    try {
      const paid = await ask('/api/v1/payments', { out: true, bolt11: invoice });
      return { result: { preimage: paid.preimage, fees_paid: Math.abs(paid.fee) }, error: undefined };
    } catch (error) {
      return refuse(error.final && /balance/.test(error.message) ? 'INSUFFICIENT_BALANCE' : 'PAYMENT_FAILED', error.message);
    }
  },
  async listTransactions({ from = 0, until = 4e9, limit = 10, offset = 0 }) {
    const window = `time[ge]=${from}&time[le]=${until}&sortby=time&direction=desc&limit=${limit}&offset=${offset}`;
    const { data, total } = await ask(`/api/v1/payments/paginated?${window}`);
    return { result: { transactions: data.map(transaction), total_count: total }, error: undefined };
  },
};
const methods = ['get_info', 'get_balance', 'make_invoice', 'lookup_invoice', 'pay_invoice', 'list_transactions'];

// === what it tells unasked: the SDK leaves that to the wallet ===

async function notify(hash) {
  const { data } = await ask(`/api/v1/payments/paginated?payment_hash=${hash}`);
  const paid = data.find((row) => row.amount > 0 && row.status === 'success');
  if (!paid) return;
  open.delete(hash);
  const told = JSON.stringify({ notification_type: 'payment_received', notification: transaction(paid) });
  const event = {
    kind: 23197,
    created_at: Math.floor(Date.now() / 1000),
    tags: [['p', given.client]],
    content: await service.encrypt(keys, told, 'nip44_v2'),
  };
  await service.relay.publish(await service.signEvent(event, given.secret));
}

await service.publishWalletServiceInfoEvent(given.secret, methods, ['payment_received']);
await service.subscribe(keys, handler);
process.stdout.write('ready\n');
for (;;) {
  await new Promise((resolve) => setTimeout(resolve, 100));
  for (const hash of open) await notify(hash).catch((error) => console.error(`no notification: ${error.message}`));
}
