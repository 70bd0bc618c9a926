# The few verbs a person needs. `just` alone lists them.

_default:
    @just --list --unsorted

# A real job from relay to relay, on this machine, with nothing else installed
demo *ARGS:
    cargo run --release -- demo {{ARGS}}

# The whole test suite; tests whose parts are missing skip by name (`just parts` installs them)
test *ARGS:
    cargo test {{ARGS}}

# Every clause of the sandbox on every backend, as one table (docs/testing.md); a word filters the cases
conformance *ARGS:
    cargo test --test conformance -- --table {{ARGS}}

# What real work needs of a sandbox, on every backend, as one table (docs/testing.md); a word filters the rows
workloads *ARGS:
    cargo test --test workloads -- --table {{ARGS}}

# Attacks on the sandboxes, with their defence off and on, as a table; with Docker where E2E_DOCKER_HOST names an engine
hostile *ARGS:
    HOSTILE_TABLE=1 cargo test --test hostile -- {{ARGS}}

# Form, lints, licences: what CI looks at before it runs a test
lint:
    .ci/run form lint deny

# The promised figures (docs/SPEC.md), measured here
bench *ARGS:
    cargo run --release -- bench {{ARGS}}

# What this host can enforce, and how to mend what it cannot
doctor *ARGS:
    cargo run --release -- doctor {{ARGS}}

# Other people's relays and clients for the end-to-end tests (docs/testing.md)
parts *NAMES:
    .ci/parts {{NAMES}}

# Everything CI does, as CI does it
ci:
    .ci/run

# Known weaknesses of our dependencies; fetches the advisory database
advisories:
    "${E2E_PARTS:-${XDG_CACHE_HOME:-$HOME/.cache}/coinop-parts}/cargo-deny/bin/cargo-deny" check advisories
