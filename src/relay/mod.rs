//! The one room that knows relays: connections, catch-up, the signature check of every event, the seen set,
//! and delivery of the outbox. It hands verified events up and sends what the store says is owed; it
//! decides nothing about jobs.
