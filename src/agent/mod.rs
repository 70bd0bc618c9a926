//! What runs in a sandbox for a job type. Today the script agent; it sees a sandbox and an order, never the network or the ledger.
