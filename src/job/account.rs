//! A customer's question about its own account: encrypted to us, answered to it alone, never a job. What is refused,
//! and how often anything is said, is as for other requests.

use super::dispatcher::Dispatcher;
use super::engine::Offer;
use super::intake::Saying;
use super::{Failure, answer};
use crate::market::{Code, judge_time};
use crate::protocol::Scheme;
use crate::protocol::request::Request;

impl Dispatcher {
    pub(super) fn asked_for_account(&mut self, request: &Request, offer: Offer) {
        if !request.is_targeted(&self.rooms.keys.public_key()) {
            return (offer.done)();
        }
        if let Err(refusal) = self.may_be_told(request) {
            return self.refuse(request, &refusal, offer);
        }
        let relay = offer.relay.clone();
        self.answered(Saying::Balance, offer, |rooms| {
            let purse = rooms
                .ledger
                .purse(&request.customer.to_hex())
                .map_err(|error| Failure::new(Code::Internal, error.to_string()))?;
            answer::account(rooms, request, &relay, &purse)
        });
    }

    fn may_be_told(&self, request: &Request) -> Result<(), Failure> {
        judge_time(&self.rooms.rules, request, self.rooms.now_ms() / 1000)?;
        if request.encryption != Some(Scheme::Nip44) {
            return Err(Failure::new(Code::Unsupported, "accounts are told to NIP-44 requests only"));
        }
        match request.param("query") {
            Some("balance") => Ok(()),
            _ => Err(Failure::new(Code::InvalidInput, "the only `query` is `balance`")),
        }
    }
}
