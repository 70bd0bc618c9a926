//! Money end to end: the program as provider and as customer, with real wallets between them, and what their books say
//! afterwards. Relay and repositories are the test's own; what a wallet answers is tested in `tests/wallet`.

mod after;
mod bank;
mod credit;
#[expect(dead_code, reason = "each test program uses a part of it")]
mod deal;
mod doubt;
mod faults;
mod holds;
mod kills;
mod lock_kills;
mod mixed;
mod paid;
mod reconcile;
mod reports;
mod restored;
mod sales;
mod vault;
mod zaps;

#[path = "../support/lnbits.rs"]
#[expect(dead_code, reason = "each test program uses a part of it")]
mod lnbits;
#[path = "../support/nwc.rs"]
mod nwc;
#[path = "../e2e/parts.rs"]
#[expect(dead_code, reason = "each test program uses a part of it")]
mod parts;
#[expect(dead_code, reason = "each test program uses a part of it")]
#[path = "../support/mod.rs"]
mod support;

#[path = "../../src/wallet/testing.rs"]
#[expect(dead_code, reason = "each test program uses a part of it")]
mod testing;

use coinop::wallet::{PaymentHash, Preimage};
use support::skip;
